"""Studies on real models and texts: fine-tune, fuse, measure what is left. Not part of the installed package."""
