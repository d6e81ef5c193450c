"""A language model that generates: adapters for six tasks, fused in every way and compared; `run.study`."""
