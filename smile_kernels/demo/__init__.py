"""The main job on real models and real texts: `run.demo`."""
