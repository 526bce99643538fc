"""Drop-in torch.optim optimizers with exact weight decay, L1 and clipping inside the step."""

from fusedreg import penalty
from fusedreg.groups import param_groups, sparsity
from fusedreg.optimizer import FusedOptimizer
from fusedreg.optimizers.adagrad import Adagrad
from fusedreg.optimizers.adam import Adam
from fusedreg.optimizers.adamw import AdamW
from fusedreg.optimizers.lamb import LAMB
from fusedreg.optimizers.lion import Lion
from fusedreg.optimizers.rmsprop import RMSprop
from fusedreg.optimizers.sgd import SGD

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
