"""A file of text as a probe: one sample per line, tokenized batch by batch, never held whole.

`.txt`: a line is a sample. `.jsonl`: a line is a JSON object with the text in a field, and its class, if it has one,
in another. Blank lines are skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emscan.errors import ProbeError
from emscan.load.source import brief, printable
from emscan.probe.arguments import Arguments
from emscan.probe.batch import ID_WEIGHT, INPUT_BUDGET, MOST_SAMPLES, Batch, Placing, Probe
from emscan.probe.signature import TARGET_NAMES, Signature, match_named, match_ordered, signature
from emscan.probe.tokens import Tokenizer, find_tokenizer
from emscan.report.document import ProbeInfo

ENDINGS = frozenset({".txt", ".jsonl"})
_KNOWN = ("max_length", "tokenizer", "field")
_LONGEST_LINE = 1 << 20  # bytes; the rest of a longer line is beyond what models read, and is dropped
_TOKENS = INPUT_BUDGET // ID_WEIGHT  # padded, of a batch
_AT_ONCE = 64  # lines that are tokenized together
_MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One line. ``target``: its class."""

    number: int
    text: str
    target: int | None


def open_text(
    spec: str, module: nn.Module, placing: Placing, size: int | None, seed: int,
    arguments: Mapping[str, str] | None, folder: Path | None, trust: bool,
) -> Probe:  # fmt: skip
    """Return the probe over the lines of a file; ``folder``: where the model and its tokenizer lie.

    Raises ProbeError for a file that cannot be read, or where there is no tokenizer; UsageError for options.
    """
    options = Arguments(arguments, _KNOWN, "a text file")
    path = Path(spec)
    if not path.is_file():
        what = "does not exist" if not path.exists() else "is a folder" if path.is_dir() else "is no regular file"
        raise ProbeError(f"the probe {spec} {what}", "give a file with one sample per line")
    asked = options.text("tokenizer")
    longest = options.number("max_length", 1, _MOST_TOKENS)
    tokenizer = find_tokenizer(Path(asked) if asked is not None else folder, module, trust, longest)
    call = _Call(module, signature(module), tokenizer.pad, f"the probe {spec}")
    most = f", at most {tokenizer.longest:,} tokens" if tokenizer.longest is not None else ""
    info = ProbeInfo(f"{spec}: lines of text, tokenizer {tokenizer.source}{most}{call.describe()}", seed=seed)
    return Probe(info, _Passes(path, options.text("field"), tokenizer, call, placing, size, info), None)


# -- lines ------------------------------------------------------------------------------------------------------------


@dataclass
class _Reader:
    """Samples of a file, and the digest of its bytes once they are all read."""

    path: Path
    key: str | None
    digest: Any = field(default_factory=hashlib.sha256)

    def __iter__(self) -> Iterator[Sample]:
        objects = self.path.suffix.lower() == ".jsonl"
        for number, line in self._lines():
            text = self._decoded(line, number)
            if not text.strip():
                continue
            yield self._sample(text, number) if objects else Sample(number, text, None)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        number, start = 1, True
        try:
            with self.path.open("rb") as file:
                while chunk := file.readline(_LONGEST_LINE):
                    self.digest.update(chunk)
                    if start:
                        yield number, chunk
                    start = chunk.endswith(b"\n")
                    number += start
        except OSError as error:
            raise ProbeError(f"cannot read the probe {self.path}: {brief(error)}", "check the file") from None

    def _decoded(self, line: bytes, number: int) -> str:
        cut = len(line) == _LONGEST_LINE and not line.endswith(b"\n")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8", "ignore" if cut else "strict")
        except UnicodeDecodeError as error:
            raise ProbeError(
                f"cannot read the probe {self.path}: line {number:,} is not UTF-8 (byte {error.start})",
                "save it as UTF-8 text",
            ) from None
        return text.rstrip("\r\n")

    def _sample(self, line: str, number: int) -> Sample:
        where = f"cannot read the probe {self.path}: line {number:,}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ProbeError(f"{where} is not JSON ({brief(error)})", "write one JSON object per line") from None
        name = self.key or "text"
        if not isinstance(value, dict) or not isinstance(value.get(name), str):
            held = (
                f" (it has {', '.join(printable(key, 40) for key in list(value)[:5])})"
                if isinstance(value, dict)
                else ""
            )
            raise ProbeError(
                f"{where} has no text in a field {printable(name, 40)!r}{held}", "name it: --probe-arg field=NAME"
            )
        target = next((value[key] for key in TARGET_NAMES if key in value and key != name), None)
        known = isinstance(target, int) and not isinstance(target, bool) and -(2**63) <= target < 2**63
        return Sample(number, value[name], target if known else None)


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """How ids become the arguments of forward: with a mask where it takes one, and shifted for a decoder."""

    module: nn.Module
    forward: Signature
    pad: int
    where: str

    @property
    def _names(self) -> list[str]:
        return [parameter.name for parameter in self.forward.parameters]

    @property
    def _start(self) -> int | None:
        """The id that a decoder starts from, None where there is no decoder beside an encoder."""
        config = getattr(self.module, "config", None)
        if not getattr(config, "is_encoder_decoder", False) or "decoder_input_ids" not in self._names:
            return None
        fields = vars(config)
        found = (fields.get(name) for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"))
        return next((value for value in found if isinstance(value, int)), self.pad)

    def describe(self) -> str:
        """Return in words what goes with the ids."""
        masked = "attention_mask" in self._names
        mask = "" if masked else f", padded with {self.pad} and no mask, which forward does not take"
        return mask + (", decoder: the same text after its start token" if self._start is not None else "")

    def batch(self, rows: list[list[int]], targets: list[int | None]) -> Batch:
        """Return the call for rows of ids; targets only where every row has one."""
        longest = max(1, *map(len, rows))
        ids = torch.tensor([row + [self.pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        if "input_ids" not in self._names and "attention_mask" not in self._names:
            call = match_ordered([ids], self.forward, self.where)
        else:
            call = match_named(self._named(ids, mask), self.forward, self.where)
        known = [target for target in targets if target is not None]
        return Batch(call.args, call.kwargs, torch.tensor(known) if len(known) == len(rows) else None, len(rows))

    def _named(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        values = {"input_ids": ids}
        if "attention_mask" in self._names:
            values["attention_mask"] = mask
        start = self._start
        if start is not None:
            values["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
            if "decoder_attention_mask" in self._names:
                values["decoder_attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], dim=1)
        if "token_type_ids" in self.forward.required:
            values["token_type_ids"] = torch.zeros_like(ids)
        return values


@dataclass
class _Passes:
    """One pass over the file at every call; the first complete one gives the digest of its bytes."""

    path: Path
    key: str | None
    tokenizer: Tokenizer
    call: _Call
    placing: Placing
    size: int | None
    info: ProbeInfo

    def __call__(self) -> Iterator[Batch]:
        reader = _Reader(self.path, self.key)
        rows: list[list[int]] = []
        targets: list[int | None] = []
        for ids, target in self._tokenized(reader):
            if rows and self._full(rows, ids):
                yield self._placed(rows, targets)
                rows, targets = [], []
            rows.append(ids)
            targets.append(target)
        if rows:
            yield self._placed(rows, targets)
        self.info.sha256 = reader.digest.hexdigest()

    def _full(self, rows: list[list[int]], ids: list[int]) -> bool:
        if self.size is not None:
            return len(rows) >= self.size
        longest = max(len(ids), *map(len, rows))
        return len(rows) >= MOST_SAMPLES or (len(rows) + 1) * longest > _TOKENS

    def _placed(self, rows: list[list[int]], targets: list[int | None]) -> Batch:
        return self.placing.place(self.call.batch(rows, targets))

    def _tokenized(self, reader: _Reader) -> Iterator[tuple[list[int], int | None]]:
        waiting: list[Sample] = []
        for sample in reader:
            waiting.append(sample)
            if len(waiting) == _AT_ONCE:
                yield from self._ids(waiting)
                waiting = []
        yield from self._ids(waiting)

    def _ids(self, samples: list[Sample]) -> Iterator[tuple[list[int], int | None]]:
        for sample, ids in zip(samples, self.tokenizer.encode([s.text for s in samples]), strict=True):
            if ids:  # a line that the tokenizer knows nothing of is no sample
                yield ids, sample.target
