"""What a technique is: a named, reversible change to a pipeline.

They compose in one line:

    with applied(pipe, first_block(0.12), some_other()):
        pipe("a red apple on a white table")
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

from fluxnb.errors import UserError
from fluxnb.families import Family

# How far a technique's image is from the one without it, the nearest first.
IDENTICAL, ROUNDING, ANOTHER = "identical", "rounding", "another image"
EXACT_TERMS = {
    IDENTICAL: "the image without it, bit for bit",
    ROUNDING: "the same arithmetic in another order or by another kernel, so that numbers are rounded elsewhere",
    ANOTHER: "what is computed is something else, and so is the image, a little or a lot",
}
EXACTNESS = tuple(EXACT_TERMS)

# What techniques leave on a transformer, for those that come after them.
BLOCKS = "_fluxnb_blocks"  # some of its blocks are run as one: (double blocks, single blocks)
RECORDED = "_fluxnb_recorded"  # its steps are replayed from a recording
SHARED = "_fluxnb_shared"  # it has a share of the tokens: the process group that has them all
CACHED = "_fluxnb_cache"  # it has a cache
AHEAD = "_fluxnb_ahead"  # its modulations are computed ahead
HALVED = "_fluxnb_halved"  # its first steps are at half the width and height


class Technique:
    """A named, reversible change to a pipeline. Subclasses give the class attributes, and `apply`."""

    # class attributes, or properties where they depend on what was chosen
    name: str  # the field's standard term
    settings: dict  # plain values: what distinguishes this one from others of the same name
    label: str  # name and everything that distinguishes it, as a reader wants to see it
    family: Family  # decides the colour in every chart
    exact: str  # one of EXACTNESS
    terms: dict = {}  # made-up words of its label, each with half a sentence
    part: str = ""  # of `fluxnb.adapters.PARTS`: what a class of transformers has to have for it
    needed: tuple[str, ...] = ("transformer",)  # the pipeline's parts without which it can't be put on
    proof: dict  # what shows that it did something, filled in by `apply` or while images are made; may be missing

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if apply := vars(cls).get("apply"):

            @functools.wraps(apply)
            def checked(self, pipe):
                check_parts(pipe, self.needed)
                return apply(self, pipe)

            cls.apply = checked  # type: ignore[method-assign]

    @property
    def mark(self) -> str:
        """What a chart writes at its point: the value of its family's dial where it has one, else its label."""
        value = self.settings.get(self.family.dial)
        return self.label if value is None else f"{value:g}"

    def apply(self, pipe) -> Callable[[], None]:
        """Changes `pipe` in place and returns the function that takes the change back.

        Raises:
            Unavailable: it can't run here; the message begins with what it needs.
        """
        raise NotImplementedError


class Unavailable(Exception):
    """A technique can't run here. The message says what it needs; it becomes the row's reason."""


def check_parts(pipe, names: tuple[str, ...]) -> None:
    """Raises Unavailable where a pipeline hasn't got all of these parts, or is none."""
    for name in names:
        if isinstance(pipe, type) or getattr(pipe, name, None) is None:
            raise Unavailable(f"needs a pipeline with a part {name!r}, and this {type(pipe).__name__} has none")


def least_exact(*techniques: Technique) -> str:
    """How far the image is from the one without any of the techniques: as far as the furthest of them takes it."""
    return max((t.exact for t in techniques), key=EXACTNESS.index, default=IDENTICAL)


def networks(pipe) -> list:
    """The networks that run at every step: the transformer and, where there are some, the ControlNets."""
    controlnet = getattr(pipe, "controlnet", None)
    return [pipe.transformer, *([] if controlnet is None else getattr(controlnet, "nets", [controlnet]))]


def take_all_back(undo: list[Callable[[], None]]) -> None:
    """Takes techniques back that were put on one after the other, the latest first; each leaves the list.

    Raises:
        UserError: something else is on top of one of them, or is running; nothing has been taken back.
    """
    gone: list[Changes] = []
    for changes in (getattr(one, "__self__", None) for one in reversed(undo)):
        if isinstance(changes, Changes):
            changes.check_top(gone)
            gone.append(changes)
    while undo:
        undo[-1]()
        undo.pop()


@contextmanager
def applied(pipe, *techniques: Technique):
    """The pipeline with the techniques applied in order; taken back in reverse order, whatever happens."""
    with ExitStack() as stack:
        for technique in techniques:
            stack.callback(technique.apply(pipe))
        yield pipe


# --- changes that are taken back --------------------------------------------------------------------------

_NOTHING = object()
_changed: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # owner -> name -> its changes, the latest last


class Changes:
    """Changes of a pipeline that are taken back together, or not at all where something else stands on top of one.

    Leaving the block by an exception takes back what was changed until then:

        with Changes(self.label) as changes:
            changes.put(vae, "use_slicing", True)
        return changes.take_back

    Args:
        name: whose they are, for messages.
    """

    def __init__(self, name: str):
        self.name, self.lock = name, nullcontext()  # what is taken back waits for the lock
        self._whose = (name, object())  # in a change's place for this: no cycle keeps what was before
        self._made: list = []
        self._layers: dict = {}

    def __enter__(self) -> Changes:
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            self._undo()

    def put(self, owner, name: str, value, yields: bool = False) -> None:
        """`owner.name` is `value` from now on, an attribute of the instance.

        Args:
            yields: what is put there later stays; otherwise it has to go before this can be taken back.
        """
        self._check_idle(owner, name)
        self._made.append(_Put(self._whose, owner, name, value, yields))
        _set(owner, name, value)

    def wrap(self, module, make: Callable) -> None:
        """`make(forward)` runs in place of a module's forward, below the hooks that offload it, which come and go."""
        self._made.append(change := _Wrap(self._whose, module, "forward"))
        change.put(make)

    def refuse(self, owner, names: tuple[str, ...], why: str) -> None:
        """Methods that would go wrong meanwhile raise UserError, before anything changes."""
        for name in names:
            if hasattr(owner, name):
                self.put(owner, name, _Refused(why))

    def moved(self, module, then: Callable) -> None:
        """`then(function)` follows whenever a module's tensors are moved or converted by a function of one."""
        self.put(module, "_apply", _Moving(module, then))

    def callback(self, function: Callable, *args) -> None:
        """What takes back a change that nothing can stand on top of."""
        self._made.append(_Step(functools.partial(function, *args)))

    def check(self, above: Callable[[], str | None]) -> None:
        """`above()` says what stands on top of a change, if something does."""
        self._made.append(_Step(above=above))

    def exchange(self, network, parent, name: str, new) -> None:
        """A layer of a network gives way to another; the original comes back wherever a LoRA has put that meanwhile."""
        self._check_idle(network)
        if network not in self._layers:
            self._layers[network] = layers = _Layers(network)
            self._made.append(layers)
            self.moved(network, functools.partial(_follow, layers.originals))
        self._layers[network].put(parent, name, new)

    def take_back(self) -> None:
        """Takes the changes back, the latest first; again, it does nothing.

        Raises:
            UserError: something stands on top of one of them, or is running; nothing has been taken back.
        """
        with self.lock:
            self.check_top()
            self._undo()

    def check_top(self, gone: Sequence[Changes] = ()) -> None:
        """Raises UserError where these can't be taken back, once those of `gone` have been; nothing is changed."""
        with self.lock:
            for change in reversed(self._made):
                self._check_idle(change.owner, change.name)
                if above := change.above(gone):
                    raise UserError(
                        f"{self.name} can't be taken off while {above} is on top of it: take that off first."
                    )

    def _check_idle(self, owner, name: str = "") -> None:
        """Raises UserError while another thread runs the owner of a change, or this one a pipeline's scheduler."""
        running = ["__call__", "forward"]
        running += ["_call_impl"] if isinstance(self.lock, nullcontext) else []  # where it waits for the lock
        frame = at = None
        try:
            for thread, frame in sys._current_frames().items() if owner is not None else ():
                at = frame if thread != threading.get_ident() or name == "scheduler" else None
                while at is not None:
                    if at.f_code.co_name in running and at.f_locals.get("self") is owner:
                        raise UserError(
                            f"{self.name} can't be put on or taken off while an image is made with what it changes: "
                            "wait until that is done."
                        )
                    at = at.f_back
        finally:
            del frame, at  # one of them is this call's own: a cycle, which would keep what was exchanged

    def _undo(self) -> None:
        made, self._made = self._made, []
        with ExitStack() as stack:
            for change in made:
                stack.callback(change.undo)


class _Refused:
    """A method's place while it would go wrong; a class, because functions of functions can't be pickled."""

    def __init__(self, why: str):
        self.why = why

    def __call__(self, *_, **__):
        raise UserError(self.why)


class _Step:
    owner, name = None, ""

    def __init__(self, undo=lambda: None, above=lambda: None):
        self.undo, self._above = undo, above

    def above(self, gone: Sequence[Changes]) -> str | None:
        return None if gone else self._above()  # which may look at what will be gone


class _Put:
    """A changed attribute. Others know it weakly: where nobody can take it back, what was before is freed."""

    def __init__(self, whose: tuple, owner, name: str, value=None, yields: bool = False):
        self.whose, self.owner, self.name, self.value, self.yields = whose, owner, name, value, yields
        self.before = getattr(owner, name) if _owns(owner, name) else _NOTHING
        _changed.setdefault(owner, {}).setdefault(name, []).append(weakref.ref(self))

    def above(self, gone: Sequence[Changes]) -> str | None:
        """What stands on top of it, once other changes will have been taken back."""
        theirs, later = [changes._whose for changes in gone], self._later()
        *_, top = [change for change in later if change.whose not in theirs] or [self]
        if self.yields or top is not self and top.whose is self.whose:
            return None
        if top is not self:
            return top.whose[0]
        return (
            f"what has changed its {self.name} since" if not later and self._there() and not self._mine(gone) else None
        )

    def _later(self) -> list[_Put]:
        """The changes of the same attribute that came later."""
        live = [change for ref in _changed[self.owner][self.name] if (change := ref()) is not None]
        return live[live.index(self) + 1 :]

    def _there(self) -> bool:
        return _owns(self.owner, self.name)

    def _mine(self, gone: Sequence[Changes] = ()) -> bool:
        return _under(getattr(self.owner, self.name, _NOTHING), gone) is self.value

    def undo(self) -> None:
        later, made = self._later(), _changed[self.owner][self.name]
        made[:] = [ref for ref in made if ref() not in (None, self)]
        if later:
            later[0].before = self.before
        elif self._mine():
            self._write_back()

    def _write_back(self) -> None:
        if self.before is not _NOTHING:
            _set(self.owner, self.name, self.before)
        elif _owns(self.owner, self.name):
            delattr(self.owner, self.name)


class _Wrap(_Put):
    """A changed forward. Hooks of accelerate and diffusers keep the one that they stand on in places of their own."""

    def put(self, make: Callable) -> None:
        holder, name = next(
            (place for place in _forwards(self.owner) if not _hooks(place)), (vars(self.owner), "forward")
        )
        self.original = holder.get(name) or self.owner.forward
        self.value = holder[name] = make(self.original)

    def _there(self) -> bool:
        return bool(_forwards(self.owner))

    def _mine(self, gone: Sequence[Changes] = ()) -> bool:
        return any(holder[name] is self.value for holder, name in _forwards(self.owner))

    def _write_back(self) -> None:
        for holder, name in _forwards(self.owner):
            if holder[name] is self.value:
                holder[name] = self.original
        if getattr(vars(self.owner).get("forward"), "__func__", None) is type(self.owner).forward:
            del vars(self.owner)["forward"]


class _Layers:
    """Layers of a network that were exchanged."""

    name = ""

    def __init__(self, network):
        self.network = self.owner = network
        self.exchanged: dict = {}  # the one that is there now -> the original
        self.originals: weakref.WeakSet = weakref.WeakSet()  # freed where nobody can take this back

    def put(self, parent, name: str, new) -> None:
        self.exchanged[new] = old = parent._modules[name]
        self.originals.add(old)
        parent._modules[name] = new

    def _places(self) -> list[tuple[dict, str]]:
        owns = [module._modules for module in self.network.modules()]
        return [(own, name) for own in owns for name, child in own.items() if child in self.exchanged]

    def above(self, gone: Sequence[Changes]) -> str | None:
        there = {_under(child, gone) for module in self.network.modules() for child in module._modules.values()}
        found = there & self.exchanged.keys()
        if len(found) < len(self.exchanged):
            return "what has replaced its layers since"
        wrapped = [layer for layer in found if _wrapped(layer) and not (gone and "forward" in _changed.get(layer, {}))]
        hooked = wrapped or any(map(_places, self.network.modules()))
        return "what offloads or casts its layers one by one" if hooked else None

    def undo(self) -> None:
        for own, name in self._places():
            own[name] = self.exchanged[own[name]]


def _under(module, gone: Sequence[Changes]):
    """The layer that will be in a layer's place, once changes will have been taken back, the latest of them first."""
    for layers in (layers for changes in gone for layers in changes._layers.values()):
        module = layers.exchanged.get(module, module) if isinstance(module, Hashable) else module
    return module


def _follow(modules: weakref.WeakSet, function) -> None:
    for module in modules:
        module._apply(function)


class _Moving:
    """In place of a module's `_apply`, which converts its tensors; a copy of the module has its own."""

    def __init__(self, module, then):
        self.module, self.before, self.then = module, module._apply, then

    def __call__(self, function, *args, **kwargs):
        self.before(function, *args, **kwargs)
        self.then(function)
        return self.module

    def __reduce_ex__(self, _):
        return functools.partial, (type(self.module)._apply, self.module)


def _set(owner, name: str, value) -> None:
    """An attribute set; where it is a module's class, hooks that have kept its forward get that of the new class."""
    before = type(owner)
    setattr(owner, name, value)
    if name == "__class__" and hasattr(before, "forward"):
        for holder, place in _forwards(owner):
            if getattr(holder[place], "__func__", None) is before.forward:
                holder[place] = value.forward.__get__(owner)


def _owns(owner, name: str) -> bool:
    """Whether the instance itself has an attribute."""
    own = vars(owner)
    return name == "__class__" or name in own or any(name in own.get(kind, ()) for kind in ("_modules", "_parameters"))


def _wrapped(module) -> bool:
    """Whether something stands in place of a module's forward; hooks that come off leave it there by itself."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def _places(module) -> bool:
    """Whether a hook of accelerate's offloads the layers inside a module, which it knows by their names."""
    hook = vars(module).get("_hf_hook")
    try:
        hooks = hook.hooks  # of several, one after the other
    except AttributeError:
        hooks = (hook,)
    return any(getattr(one, "offload", False) and one.place_submodules for one in hooks)


def _forwards(module) -> list[tuple[dict, str]]:
    """(holder, name) of every place where a forward of a module is kept."""
    own = vars(module)
    references = getattr(own.get("_diffusers_hook"), "_fn_refs", ())
    places = [(own, "forward"), (own, "_old_forward")]
    places += [(vars(reference), name) for reference in references for name in ("original_forward", "forward")]
    return [(holder, name) for holder, name in places if holder.get(name) is not None]


def _hooks(place: tuple[dict, str]) -> bool:
    """Whether a forward is a hook's, which calls another one."""
    holder, name = place
    made_by = getattr(getattr(holder[name], "func", None), "__module__", None) or ""
    return made_by.startswith(("accelerate.hooks", "diffusers.hooks"))


class attribute:  # noqa: N801  read as a function: with attribute(owner, name, value)
    """`owner.name` is `value` inside; afterwards the instance has the attribute only if it had it before.

    A class, not a generator: a generator that nobody holds is closed, which would take the change back.
    """

    def __init__(self, owner, name: str, value):
        self.owner, self.name, self.value = owner, name, value

    def __enter__(self):
        own = vars(self.owner)
        self.had, self.before = self.name in own, own.get(self.name)
        own[self.name] = self.value  # past nn.Module.__setattr__, which would register a module

    def __exit__(self, *_):
        if self.had:
            vars(self.owner)[self.name] = self.before
        else:
            vars(self.owner).pop(self.name, None)
