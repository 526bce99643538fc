"""What an optimizer supplies: its options, its states and its rule, once for each path.

The stepper, the engine and the reference path see an optimizer as the `UpdateRule` that it is. A
subclass of FusedOptimizer sets the attributes below and overrides `update` and `device_rule`, and
of the other methods those that differ. docs/adding-an-optimizer.md goes through two.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from fusedreg.checks import misspelt
from fusedreg.formats import Format, Plain, planes_of
from fusedreg.kernels.contract import Rule as DeviceRule
from fusedreg.options import (
    Option,
    StepOptions,
    TorchOptions,
    complete_signature,
    declarations,
    nearest,
    owner,
)
from fusedreg.penalties import PENALTIES, Penalty, PenaltyOptions
from fusedreg.scalars import Count, Number
from fusedreg.types import ParamGroup, Settings, State, Update


class Options(PenaltyOptions, StepOptions, total=False):
    """Options that every class here has and no class of torch.optim."""


class AllOptions(TorchOptions, StepOptions, PenaltyOptions, total=False):
    """All options that every class here has."""


class UpdateRule:
    """Base class of what an optimizer supplies."""

    defaults: dict[str, Any]
    """The options of a group, each with its value where a group does not say otherwise."""
    tensor_states: tuple[str, ...] = ()
    """Names of the states shaped like the parameter."""
    counts: Mapping[str, Count] = MappingProxyType({})
    """The states of one number by name, such as `{"step": Count()}`, in the device rule's order."""
    late_states: tuple[str, ...] = ()
    """Names of those that an option turned on later adds, so that a checkpoint may lack them."""
    device_options: tuple[str, ...] = ()
    """Names of the options that the device rule takes, in its order; a pair counts as two."""
    option_sets: ClassVar[tuple[type, ...]] = (TorchOptions, StepOptions)
    """TypedDicts that declare options, except those of penalties, `lr` and the rule's own."""
    option_defaults: Mapping[str, object] = MappingProxyType({})
    """Defaults of this class and its subclasses for declared options.

    Not for those that a constructor writes out: it has their defaults.
    """
    fixed_options: Mapping[str, object] = MappingProxyType({})
    """Options that every group of this class and its subclasses has, whatever a file says."""
    declared_options: ClassVar[Mapping[str, Option]] = MappingProxyType({})
    """All of `option_sets` and of `penalties`, by name."""
    _new_defaults: ClassVar[frozenset[str]] = frozenset()
    _new_fixed: ClassVar[frozenset[str]] = frozenset()
    """Names in the class's own `option_defaults` and `fixed_options`, without those of bases."""
    own_options: frozenset[str] = frozenset()
    """Options that belong to the optimizer, so that no group may have them."""
    penalties: tuple[Penalty, ...] = PENALTIES
    """What a step adds to the rule, in this order at each stage; see penalties/base.py."""
    layerwise: bool = False
    """Whether lr is multiplied by the trust ratio of each tensor, ||w|| / ||update||."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Complete the signature, and raise if kernels would run another rule than `update`."""
        super().__init_subclass__(**kwargs)
        cls._declare_options()
        inherits = cls.device_rule is not UpdateRule.device_rule
        if inherits and owner(cls, "update") < owner(cls, "device_rule"):
            raise TypeError(
                f"{cls.__name__} overrides update but not device_rule, so kernels would still "
                "run the rule that it inherits: return the Rule that computes the same from "
                "device_rule, or None for the reference path"
            )

    @classmethod
    def __subclasses__(cls) -> list[type]:
        """Those below this class that no class of torch.optim has below it too.

        Registries walk down from torch.optim.Optimizer and would meet them twice.
        """
        return [
            below
            for below in type.__subclasses__(cls)
            if not any(base.__module__.startswith("torch.optim.") for base in below.__bases__)
        ]

    @classmethod
    def _declare_options(cls) -> None:
        """Gather all options, also those of penalties; show them in the constructor's signature."""
        sets = (*cls.option_sets, *(penalty.options for penalty in cls.penalties))
        cls.declared_options = MappingProxyType(declarations(*sets))
        options = cls.declared_options.items()
        cls.own_options = frozenset(name for name, option in options if not option.of_group)
        cls._merge_option_defaults()
        complete_signature(cls, {**cls.option_defaults, **cls.fixed_options}, sets)

    @classmethod
    def _merge_option_defaults(cls) -> None:
        """Add those of the bases; raise TypeError where the class has one that is no option."""
        cls._new_defaults = frozenset(vars(cls).get("option_defaults", ()))
        cls._new_fixed = frozenset(vars(cls).get("fixed_options", ()))
        bases = [vars(base) for base in reversed(cls.__mro__)]
        for attribute in ("option_defaults", "fixed_options"):
            merged = {
                name: value for base in bases for name, value in base.get(attribute, {}).items()
            }
            setattr(cls, attribute, MappingProxyType(merged))
        for name in cls._new_defaults:
            if name not in cls.declared_options:
                raise TypeError(
                    f"{cls.__name__}.option_defaults has {name!r}, which is no declared option"
                    f"{nearest(name, cls.declared_options)}"
                )

    @classmethod
    def _with_class_defaults(
        cls, defaults: Mapping[str, object], options: Mapping[str, object]
    ) -> dict[str, object]:
        """All options: those given, those of the class, and those of the declarations.

        Raises:
            TypeError: there is no such option, or one that is needed is missing.
            ValueError: one that is fixed is given another value.
        """
        cls._check_names(defaults, options)
        cls.check_fixed(options)
        declared = {name: option.default for name, option in cls.declared_options.items()}
        of_class = {name: x for name, x in cls.option_defaults.items() if name in declared}
        values = {**declared, **of_class, **defaults, **options}
        return {**values, **cls.fixed_among(values)}

    @classmethod
    def fixed_among(cls, options: Mapping[str, object]) -> dict[str, object]:
        """Those of `fixed_options` that there are; one goes with the penalty that declares it."""
        return {name: value for name, value in cls.fixed_options.items() if name in options}

    @classmethod
    def check_fixed(cls, options: Mapping[str, object]) -> None:
        """Raise ValueError where an option that every group has is another one."""
        for name, value in cls.fixed_among(options).items():
            given = options[name]
            given = tuple(given) if isinstance(given, list) else given
            if isinstance(given, Tensor) or given != value:
                raise ValueError(
                    f"Invalid {name} value: {options[name]!r} (every group of {cls.__name__} has "
                    f"{name}={value!r})"
                )

    @classmethod
    def _check_names(cls, defaults: Mapping[str, object], options: Mapping[str, object]) -> None:
        """Raise TypeError for a name that is no option, or if one that is needed is missing."""
        who, declared = cls.__name__, cls.declared_options
        parameters = inspect.signature(cls).parameters
        for name in options:
            if name not in declared:
                raise TypeError(
                    f"{who}.__init__() got an unexpected keyword argument {name!r}"
                    f"{nearest(name, parameters)}"
                )
        for name in defaults:
            own = name in parameters or name in ("lr", *cls.device_options)
            near = misspelt(name, declared)
            if near is not None and not own and name not in declared:
                raise TypeError(
                    f"{who} has no option {name!r}, which is among its defaults. "
                    f"Did you mean {near!r}?"
                )
        for name in cls._new_defaults:
            if name in defaults:
                raise TypeError(
                    f"{who}.option_defaults has {name!r}, but its constructor passes one of its "
                    "own: change the default in a constructor"
                )
        for name in cls._new_fixed:
            if name not in declared and name not in defaults:
                raise TypeError(
                    f"{who}.fixed_options has {name!r}, which is no option"
                    f"{nearest(name, {**declared, **defaults})}"
                )
        for name in ("lr", *cls.device_options):
            if name not in declared and name not in defaults and name not in options:
                raise TypeError(f"{who} has no option {name!r} among its defaults")

    def check_group(self, group: ParamGroup, read_device: bool) -> None:
        """Raise ValueError where an option of this class is out of range.

        Args:
            group: the options.
            read_device: whether numbers on an accelerator may be read, which waits for it.
        """

    def states(self, group: Settings) -> tuple[str, ...]:
        """Those of `tensor_states` that a step of this group moves, in their order: here all."""
        return self.tensor_states

    def counts_of(self, group: Settings) -> tuple[str, ...]:
        """Those of `counts` that a step of this group needs: here all but the late ones."""
        return tuple(name for name in self.counts if name not in self.late_states)

    def first_value(self, group: Settings, name: str) -> Number:
        """What every entry of a tensor state is before the first step: here 0."""
        return 0.0

    def state_format(self, group: Settings, param: Tensor) -> Format:
        """How the tensor states of a parameter are stored: here as `state_dtype` says.

        It must be the same in every step of a parameter.
        """
        return Plain(group["state_dtype"])

    def init_state(self, group: Settings, param: Tensor, state: dict[str, Tensor]) -> None:
        """Create what `state` lacks for the next step of `param`: `counts_of` and `states`."""
        for name in self.counts_of(group):
            if name not in state:
                state[name] = self.counts[name].create(param)
        storage = self.state_format(group, param)
        for name in self.states(group):
            planes = planes_of(storage, [name])
            if planes[0] not in state:
                created = storage.create(param, self.first_value(group, name))
                state.update(zip(planes, created, strict=True))

    def device_rule(self, group: Settings) -> DeviceRule | str | None:
        """The rule for kernels: a `fusedreg.kernels.rules.Rule`, or the name of one of the package.

        None, as here, leaves all parameters of the group to the reference path.
        """
        return None

    def kernel_rule(self, group: Settings) -> DeviceRule | str | None:
        """`device_rule`, or None where a penalty leaves the group to the reference path."""
        on_kernels = all(penalty.on_kernels(group) for penalty in self.penalties)
        return self.device_rule(group) if on_kernels else None

    def update(self, settings: Settings, state: State, grad: Tensor) -> Update:
        """The rule in torch operations: (direction, gain, new state). It writes into no tensor.

        Args:
            settings: the options of the group, each number as a float or a 0-dim tensor.
            state: the old state. Moments have the dtype of the arithmetic and counts are numbers. A
                count of `late_states` may be missing.
            grad: the gradient after loss scale, clipping and coupled penalties.

        Returns:
            The direction, which lr multiplies. The gain, a number or a tensor: what a constant
            gradient of 1 makes of the direction. With l1_mode="prox" the threshold is
            lr * gain * l1, whose fixed point minimises loss + l1 * |w|. And the states that have
            changed, by name.
        """
        # Only the reference path asks for it: a device rule alone is enough for kernels.
        raise NotImplementedError(f"{type(self).__name__} defines no update")

    def validate(self, group: ParamGroup, read_device: bool = False) -> None:
        """Raise if an option is out of range; make numbers and pairs plain ones."""
        raise NotImplementedError  # FusedOptimizer does it: it knows what was warned of before


UpdateRule._declare_options()
