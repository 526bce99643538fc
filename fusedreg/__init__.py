"""Drop-in torch.optim optimizers with exact weight decay, L1 and clipping inside the step."""

from fusedreg import penalty
from fusedreg.adagrad import Adagrad
from fusedreg.adam import Adam, AdamW
from fusedreg.groups import param_groups, sparsity
from fusedreg.lamb import LAMB
from fusedreg.lion import Lion
from fusedreg.optimizer import FusedOptimizer
from fusedreg.rmsprop import RMSprop
from fusedreg.sgd import SGD

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "FusedOptimizer",
    "Lion",
    "RMSprop",
    "param_groups",
    "penalty",
    "sparsity",
]
__version__ = "0.1.0"
