"""Drop-in torch.optim optimizers with exact weight decay, L1 and clipping inside the step."""

from fusedreg import penalty
from fusedreg.adam import Adam, AdamW
from fusedreg.groups import param_groups, sparsity
from fusedreg.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "param_groups", "penalty", "sparsity"]
__version__ = "0.1.0"
