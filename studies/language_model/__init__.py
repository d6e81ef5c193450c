"""A language model that generates: adapters for six tasks, fused by each method and compared; `run.study`."""
