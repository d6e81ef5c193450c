"""Studies on real models and texts: fine-tune, fuse, compare. Not part of the installed package."""
