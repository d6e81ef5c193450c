"""Studies on real models and texts: fine-tune, fuse, compare. Not part of the installed package."""

import logging

# transformers imports torchao if it is installed, which logs missing libraries.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
