"""Takes the tensors out of a torch.save pickle that names things torch's restricted unpickler does not know.

Nothing is imported or called: the pickle runs on symbols (`placeholders`), whatever it would make of a name that is not
torch's own becomes a placeholder, and the tensors are made here, from bytes of the file that the strict checks of
`calls` have measured. Two occasions: a training checkpoint with plain records beside its tensors (numpy scalars,
`argparse.Namespace`), and a pickled module whose architecture the user names with --model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emscan.load import allowlist
from emscan.load.calls import Instance, Storage, Tensor
from emscan.load.placeholders import Held, PlaceholderMachine, Set
from emscan.load.source import listing

if TYPE_CHECKING:
    import torch

# Records of numbers, settings and dates. They are left out, not loaded: the list only says what may pass unseen.
_INERT = frozenset(
    "argparse.Namespace collections.Counter collections.defaultdict collections.deque copyreg._reconstructor "
    "datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone decimal.Decimal "
    "fractions.Fraction "
    "numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct numpy.core.multiarray.scalar "
    "numpy._core.multiarray.scalar numpy.dtype numpy.ndarray numpy.core.numeric._frombuffer "
    "numpy._core.numeric._frombuffer numpy.random._pickle.__randomstate_ctor numpy.random._pickle.__generator_ctor "
    "numpy.random._pickle.__bit_generator_ctor numpy.random._mt19937.MT19937 numpy.random._pcg64.PCG64 "
    "pathlib.Path pathlib.PosixPath pathlib.PurePath pathlib.PurePosixPath pathlib.PureWindowsPath "
    "pathlib.WindowsPath types.SimpleNamespace torch.torch_version.TorchVersion typing.Any typing.Dict typing.List "
    "typing.Optional typing.Tuple typing.Union uuid.UUID".split()
)
_INERT_BUILTINS = frozenset(
    "bool bytearray bytes complex dict float frozenset int list object set slice str tuple".split()
)
_INERT_MODULES = ("omegaconf.", "torch.optim.", "numpy.dtypes.")


@dataclass
class Extracted:
    """``value``: nested dicts and lists of tensors; ``foreign``: the names that were not imported."""

    value: Any
    foreign: list[str]


def allowed(done: PlaceholderMachine, *, weights_only: bool) -> bool:
    """Whether tensors may be taken from what a pickle has run to: with ``weights_only`` of any class's objects.

    Only where foreign names are all that keeps it from being loaded.
    """
    doubtful = [name for name in done.foreign if not inert(name)]
    if weights_only:
        named = all(_may_stand(name, called=name in done.called) for name in doubtful)
        return named and bool(done.foreign or done.sources)
    layered = any(name in allowlist.layers() for name in done.names)
    return bool(done.foreign) and not (doubtful or layered or done.sources)


def inert(name: str) -> bool:
    """Whether a name stands for a record of numbers, settings or dates, which is left out and not loaded."""
    module, _, last = name.rpartition(".")
    if module == "builtins":
        return last in _INERT_BUILTINS
    if module == "numpy":  # its scalar types
        return name in _INERT or last.rstrip("0123456789_") in ("float", "int", "uint", "bool", "complex", "longlong")
    return name in _INERT or name.startswith(_INERT_MODULES)


def _may_stand(name: str, *, called: bool) -> bool:
    """Whether a placeholder may stand for a name: for any class, for no function of Python itself or of torch."""
    if not called or name == "builtins.getattr":  # how a bound method is pickled
        return True
    owner = name.partition(".")[0]
    return owner not in sys.stdlib_module_names and owner not in ("torch", "numpy")


def extract(done: PlaceholderMachine, read: Callable[[Storage], bytes], device: torch.device) -> Extracted:
    """Return the tensors in what a pickle has run to. ``read`` gives the bytes of a storage.

    Modules become dicts of tensors with the names and the order of their state_dict.
    """
    return Extracted(_Builder(read, device).build(done.result), list(done.foreign))


def note(found: Extracted, *, weights_only: bool) -> str:
    """Return the note that such a load leaves in the report."""
    names = listing(found.foreign, 8) or "anything"
    if weights_only:
        return f"only the tensors were taken from it, without importing {names}"
    return f"records that are no tensors were left out, without importing {names}"


class _Builder:
    """Makes containers and tensors out of symbols, each once."""

    def __init__(self, read: Callable[[Storage], bytes], device: torch.device) -> None:
        self.read = read
        self.device = device
        self.storages: dict[str, bytearray] = {}
        self.tensors: dict[int, torch.Tensor] = {}

    def build(self, root: Any) -> Any:
        """Return the value for a symbol. Iterative: a file can nest deeply, and nest a thing in itself."""
        made: dict[int, Any] = {}
        top: list[Any] = [None]
        waiting: list[tuple[Any, Any, Any]] = [(root, top, 0)]
        while waiting:
            symbol, holder, key = waiting.pop()
            if isinstance(symbol, Tensor):
                holder[key] = self.tensor(symbol)
            elif id(symbol) in made:
                holder[key] = made[id(symbol)]
            elif isinstance(symbol, Instance) and _is_module(symbol):
                holder[key] = made[id(symbol)] = dict(self.module(symbol))
            else:
                value, entries = _container(symbol)
                holder[key] = value
                if entries is not None:
                    made[id(symbol)] = value
                    waiting.extend((inner, value, place) for place, inner in reversed(entries))
        return top[0]

    def module(self, root: Instance) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a module as its state_dict names them."""
        path: list[int] = []  # a module inside itself ends here
        waiting: list[tuple[str, Any, int]] = [("", root, 0)]
        while waiting:
            prefix, module, depth = waiting.pop()
            del path[depth:]
            if id(module) in path or not isinstance(module, Instance) or not _is_module(module):
                continue
            path.append(id(module))
            state = module.state
            hidden = state.get("_non_persistent_buffers_set")
            hidden = hidden.values if isinstance(hidden, Set) else []
            for table in (state["_parameters"], state.get("_buffers") or {}):
                for name, tensor in table.items():
                    if isinstance(tensor, Tensor) and not (table is not state["_parameters"] and name in hidden):
                        yield f"{prefix}{name}", self.tensor(tensor)
            children = [(f"{prefix}{name}.", child, depth + 1) for name, child in state["_modules"].items()]
            waiting.extend(reversed(children))

    def tensor(self, symbol: Tensor) -> torch.Tensor:
        """Return the tensor that a symbol stands for, as a view of its storage."""
        import torch

        if id(symbol) not in self.tensors:
            dtype = _dtype(symbol)
            if not symbol.count:
                made = torch.empty(symbol.shape, dtype=dtype)
            else:
                storage = symbol.storage
                if storage.key not in self.storages:
                    self.storages[storage.key] = bytearray(self.read(storage))
                flat = torch.frombuffer(self.storages[storage.key], dtype=dtype, count=storage.size // dtype.itemsize)
                made = flat.as_strided(symbol.shape, symbol.stride, symbol.offset)
            self.tensors[id(symbol)] = made.to(self.device)
        return self.tensors[id(symbol)]


def _dtype(symbol: Tensor) -> torch.dtype:
    import torch

    if symbol.dtype:
        found = getattr(torch, symbol.dtype.removeprefix("torch."))
    elif symbol.storage.kind == "torch.storage.UntypedStorage":
        found = torch.uint8
    else:
        found = getattr(torch, symbol.storage.kind.removeprefix("torch.")).dtype
    assert isinstance(found, torch.dtype)
    return found


def _is_module(symbol: Instance) -> bool:
    """Whether an object has what every nn.Module has."""
    state = symbol.state
    return type(state) is dict and all(isinstance(state.get(table), dict) for table in ("_parameters", "_modules"))


def _container(symbol: Any) -> tuple[Any, list[tuple[Any, Any]] | None]:
    """Return an empty container for a symbol and what goes into it; for anything else a plain value and None."""
    if isinstance(symbol, Held):
        if symbol.items:
            symbol = symbol.items
        elif symbol.values:
            symbol = symbol.values
        elif type(symbol.state) is dict:
            symbol = symbol.state
    if isinstance(symbol, dict):
        entries = [(key, value) for key, value in symbol.items() if not isinstance(key, Instance)]
        return dict.fromkeys(key for key, _ in entries), entries
    if isinstance(symbol, list | tuple):
        return [None] * len(symbol), list(enumerate(symbol))
    return (symbol if isinstance(symbol, int | float | str | bool | None) else None), None
