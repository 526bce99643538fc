"""What the stepper, the engine and the reference path need of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fusedreg.formats import Format
from fusedreg.kernels.contract import Rule as DeviceRule
from fusedreg.penalties import Penalty
from fusedreg.scalars import Count
from fusedreg.types import ParamGroup, Settings, State, Update


class UpdateRule(Protocol):
    """An optimizer. FusedOptimizer is one, and documents each of these."""

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
