"""The names of what passes between modules."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from fusedreg.formats import Format
from fusedreg.kernels.contract import Rule as DeviceRule
from fusedreg.penalties import Penalty
from fusedreg.scalars import Count, Number

ParamGroup: TypeAlias = dict[str, Any]
"""A param group: its parameters, and the options, which may be of any type."""
Settings: TypeAlias = Mapping[str, Any]
"""A param group without its parameters, each number where the arithmetic needs it."""
State: TypeAlias = dict[str, Any]
"""The state of one parameter, read for the arithmetic: moments widened, counts as numbers."""
Update: TypeAlias = tuple[Tensor, Number, State]
"""What a rule makes of a gradient: the direction, the gain and the new state."""
States: TypeAlias = MutableMapping[Tensor, dict[str, Tensor]]
"""The states of all parameters, by name."""
Work: TypeAlias = list[tuple[ParamGroup, list[Tensor]]]
"""Groups, each with those of its parameters that are stepped."""


class UpdateRule(Protocol):
    """What the stepper, the engine and the reference path need of an optimizer.

    FusedOptimizer is one and documents each of these.
    """

    @property
    def defaults(self) -> dict[str, Any]:
        """The options of a group, and what they are without a word of the user."""

    @property
    def own_options(self) -> frozenset[str]:
        """Options that belong to the optimizer, so that no group may have them."""

    @property
    def tensor_states(self) -> tuple[str, ...]:
        """Names of the states shaped like the parameter."""

    @property
    def counts(self) -> Mapping[str, Count]:
        """The states of one number."""

    @property
    def late_states(self) -> tuple[str, ...]:
        """Those that an option turned on later adds."""

    @property
    def device_options(self) -> tuple[str, ...]:
        """Options that the device rule takes."""

    @property
    def penalties(self) -> tuple[Penalty, ...]:
        """What a step adds to the rule."""

    @property
    def layerwise(self) -> bool:
        """Whether lr is multiplied by the trust ratio of each tensor."""

    def states(self, group: Settings) -> tuple[str, ...]:
        """Those of `tensor_states` that a step of this group moves."""

    def state_format(self, group: Settings, param: Tensor) -> Format:
        """How they are stored."""

    def init_state(self, group: Settings, param: Tensor, state: dict[str, Tensor]) -> None:
        """Create what `state` lacks."""

    def device_rule(self, group: Settings) -> DeviceRule | str | None:
        """What kernels run; None where `update` may do what is not elementwise."""

    def update(self, settings: Settings, state: State, grad: Tensor) -> Update:
        """The rule in torch operations."""

    def validate(self, group: ParamGroup, read_device: bool = False) -> None:
        """Raise where an option is out of range; make plain what is a number or a pair."""
