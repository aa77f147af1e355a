"""What 4 bits do to each part of a model: the numbers that were measured, in a file. No measuring.

A measurement of a large model takes hours, so it is kept: one JSON file is what choosing, the
figures and the model card are made from, and it says what it was made from itself.

    model          name, revision, architecture, fingerprint of its headers, sample of its weights
    calibration    text, tokens and seed; empty if no text was needed
    quantization   the 4-bit format that was tried
    modules        name -> shape, and the metrics of one linear
    groups         name -> kind, layer, modules, and the metrics of what is quantized together

A metric is there for all groups or for none, and likewise for the modules; `weight` always is.
"""

import csv
import hashlib
import io
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from quant import __version__
from quant.checkpoint import Checkpoint
from quant.display import printable
from quant.durable import write_whole
from quant.errors import BadInput
from quant.formats.nf4 import Bnb4bit
from quant.groups import KINDS, Group, find_groups
from quant.strict_files import open_regular, parse_json
from quant.tensors import TensorReader

FORMAT = 1
"""Of the file; raised when an older reader would misunderstand it."""

MAX_NBYTES = 20_000_000
"""A hundred times what QwQ-32B needs."""

MAX_LAYERS, MAX_FEATURES, MAX_WEIGHTS = 10**6, 2**31, 2**55
"""No model comes near, and whoever draws or multiplies them need not fear numbers beyond."""

LARGEST = 1e12
"""No error and no divergence comes near, and the sums of a million groups stay finite."""

MEASURE_AGAIN = "Measure again: qwq-quant measure MODEL -o sensitivity.json"

N_SHOWN = 3  # names in a message

RELATIVE, NATS = "relative squared error", "nats a token"


@dataclass(frozen=True)
class Metric:
    """A way to say how much a group suffers from 4 bits."""

    name: str
    unit: str
    about: str


METRICS = {
    m.name: m
    for m in (
        Metric("weight", RELATIVE, "|w_hat - w|^2 / |w|^2; needs no text, sees only the weights"),
        Metric("activation", RELATIVE, "of the linear's output, on the inputs of a real text"),
        Metric("block", RELATIVE, "of the residual stream after the layer, this group quantized"),
        Metric("gradient", NATS, "error of the output, weighted by how it moves the loss"),
        Metric("kld", NATS, "KL divergence of the model's output, this group alone quantized"),
    )
}
"""In the order in which they are shown: cheapest first, nearest to the truth last."""


PROVENANCE = {
    "model": {
        "name": str,
        "revision": str | None,  # the commit on the hub
        "architecture": str,
        "fingerprint": str,
        "sample": str,
    },
    "calibration": {"name": str, "sha256": str, "n_tokens": int, "seq_len": int, "seed": int},
    "quantization": {
        "quant_type": str,
        "blocksize": int,
        "double_quant": bool,
        "search_scales": bool,
    },
}
"""What a measurement says about where it comes from; calibration may be empty."""


@dataclass(frozen=True)
class MeasuredModule:
    """One linear: (out, in), and its metrics by name."""

    shape: tuple[int, int]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Sensitivity:
    """A whole measurement. Raises ValueError when made from what cannot be one."""

    model: Mapping[str, str | None]  # these three: as PROVENANCE says
    calibration: Mapping[str, str | int]
    quantization: Mapping[str, str | int | bool]
    versions: Mapping[str, str]
    modules: Mapping[str, MeasuredModule]  # by full dotted name
    groups: Mapping[str, Group]  # by their names
    metrics: Mapping[str, Mapping[str, float]]  # metric -> group -> value

    def __post_init__(self):
        for part, wanted in PROVENANCE.items():
            _check_record(part, getattr(self, part), wanted)
        Bnb4bit(**self.quantization)
        _check_record("versions", self.versions, dict.fromkeys(self.versions, str))
        _check_groups(self)
        _check_metrics("groups", self.metrics, self.groups.keys())
        by_metric: dict[str, dict[str, float]] = {}
        for module, measured in self.modules.items():
            for metric, value in measured.values.items():
                by_metric.setdefault(metric, {})[module] = value
        _check_metrics("modules", by_metric, self.modules.keys())

    def values(self, metric: str) -> dict[str, float]:
        """A metric of every group, by the group's name.

        Raises BadInput if it was not measured.
        """
        if metric not in self.metrics:
            raise BadInput(
                f"{printable(metric)} is not among the sensitivities that were measured of "
                f"{printable(self.model['name'])}.",
                f"There are: {', '.join(self.metrics)}.",
                f"Choose by one of these, or measure again with --metric {printable(metric)}.",
            )
        return dict(self.metrics[metric])

    def to_json(self) -> dict:
        """The content of the file, as this module's docstring describes it."""
        return {
            "qwq_quant": __version__,
            "format": FORMAT,
            **{part: dict(getattr(self, part)) for part in PROVENANCE},
            "versions": dict(self.versions),
            "modules": {
                name: {"shape": list(m.shape), **_in_order(m.values)}
                for name, m in self.modules.items()
            },
            "groups": {
                name: {
                    "kind": group.kind,
                    "layer": group.layer,
                    "modules": list(group.modules),
                    **_in_order({metric: v[name] for metric, v in self.metrics.items()}),
                }
                for name, group in self.groups.items()
            },
        }

    @classmethod
    def from_json(cls, content: dict) -> "Sensitivity":
        """What `to_json` gave away.

        Raises ValueError, or OverflowError for a whole number that no float holds.
        """
        version = content.get("format")
        if type(version) is int and version > FORMAT:
            raise ValueError(f"it is of format {version}; this version of qwq-quant knows {FORMAT}")
        if type(version) is not int or version != FORMAT:
            raise ValueError(f'it does not say "format": {FORMAT}')
        expected = (*PROVENANCE, "versions", "modules", "groups")
        parts = {name: _typed(content.get(name), dict, name) for name in expected}
        groups, metrics = {}, {}
        for name, value in parts["groups"].items():
            entry = dict(_typed(value, dict, name))
            modules = tuple(_typed(entry.pop("modules", None), list, f"{name}, modules"))
            groups[name] = Group(name, entry.pop("kind", None), entry.pop("layer", None), modules)
            for metric, number in _numbers(name, entry).items():
                metrics.setdefault(metric, {})[name] = number
        return cls(
            **{part: parts[part] for part in (*PROVENANCE, "versions")},
            modules={name: _module(name, value) for name, value in parts["modules"].items()},
            groups=groups,
            metrics={
                metric: metrics[metric] for metric in (*METRICS, *metrics) if metric in metrics
            },
        )

    def to_csv(self) -> str:
        """The same numbers as a table: a row for each group, then one for each module."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["level", "name", "kind", "layer", "out", "in", *METRICS])
        home = {module: group for group in self.groups.values() for module in group.modules}
        for name, group in self.groups.items():
            values = {metric: v[name] for metric, v in self.metrics.items()}
            place = [_cell(name), group.kind, group.layer, "", ""]
            table.writerow(["group", *place, *(values.get(metric, "") for metric in METRICS)])
        for name, m in self.modules.items():
            place = [_cell(name), home[name].kind, home[name].layer, *m.shape]
            table.writerow(["module", *place, *(m.values.get(metric, "") for metric in METRICS)])
        return text.getvalue()


def _in_order(values: Mapping[str, float]) -> dict[str, float]:
    return {metric: values[metric] for metric in METRICS if metric in values}


def _cell(name: str) -> str:
    """A name from a file, such that no spreadsheet takes it for a formula."""
    shown = printable(name)
    return "'" + shown if shown.startswith(("=", "+", "-", "@")) else shown


def _typed(value: object, kind: type, where: str):
    """`value`, if it is of that type and no other. Raises ValueError."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{printable(where)} is {type(value).__name__}, {wanted} is needed")
    return value


def _check_record(part: str, record: Mapping, wanted: Mapping[str, type]) -> None:
    if part == "calibration" and not record:
        return
    if odd := record.keys() ^ wanted.keys():
        raise ValueError(f"{part} lacks, or should not have, {_some(odd)}")
    for name, kind in wanted.items():
        _typed(record[name], kind, f"{part}, {name}")


def _check_groups(sensitivity: Sensitivity) -> None:
    """Raise ValueError unless every module is in one group, and every group's modules are there."""
    if not sensitivity.groups:
        raise ValueError("there are no groups")
    home: dict[str, str] = {}
    for name, group in sensitivity.groups.items():
        _check_group(name, group)
        for module in group.modules:
            if module not in sensitivity.modules:
                raise ValueError(f"{printable(module)} of {printable(name)} was not measured")
            if module in home:
                raise ValueError(f"{printable(module)} is in two groups")
            home[module] = name
    if homeless := sensitivity.modules.keys() - home.keys():
        raise ValueError(f"modules that are in no group: {_some(homeless)}")
    for name, module in sensitivity.modules.items():
        _typed(name, str, "the name of a module")
        if len(module.shape) != 2 or not all(
            0 < _typed(n, int, f"{name}, shape") < MAX_FEATURES for n in module.shape
        ):
            raise ValueError(f"{printable(name)} is no matrix")
    if sum(prod(module.shape) for module in sensitivity.modules.values()) > MAX_WEIGHTS:
        raise ValueError("the modules have more weights than any model has")


def _check_group(name: str, group: Group) -> None:
    for module in group.modules:
        _typed(module, str, f"{name}, modules")
    if group.name != name or not group.modules:
        raise ValueError(f"{printable(name)} has no modules, or another name")
    if _typed(group.kind, str, f"{name}, kind") not in {kind.name for kind in KINDS}:
        raise ValueError(f"{printable(name)} is of no known kind")
    if not 0 <= _typed(group.layer, int, f"{name}, layer") < MAX_LAYERS:
        raise ValueError(f"{printable(name)} is in layer {printable(group.layer, 20)}")


def _check_metrics(
    what: str, metrics: Mapping[str, Mapping[str, float]], names: Collection[str]
) -> None:
    """Raise ValueError unless all have the same metrics, known ones, of possible values."""
    if unknown := metrics.keys() - METRICS.keys():
        raise ValueError(f"there is no metric {_some(unknown)}")
    for metric in {"weight": {}, **metrics}:
        values = metrics.get(metric, {})
        if lacking := names - values.keys():
            raise ValueError(f"{metric} is missing of the {what} {_some(lacking)}")
        if foreign := values.keys() - names:
            raise ValueError(f"{metric} is there for {_some(foreign)}, which are no {what}")
        for name, value in values.items():
            if not 0 <= _typed(value, float, f"{name}, {metric}") <= LARGEST:
                raise ValueError(
                    f"{metric} of {printable(name)} is {value:g}; 0 to {LARGEST:g} is possible"
                )


def _some(names: Iterable[str]) -> str:
    names = sorted(map(printable, names))
    more = f" and {len(names) - N_SHOWN} more" if len(names) > N_SHOWN else ""
    return ", ".join(names[:N_SHOWN]) + more


# --- the file ---------------------------------------------------------------------------------


def write_sensitivity(path: Path, sensitivity: Sensitivity) -> None:
    """Write it, whole or not at all. Raises CannotCreate or OutputFailed."""
    write_whole(path, encode_sensitivity(sensitivity))


def encode_sensitivity(sensitivity: Sensitivity) -> bytes:
    """The file."""
    return (json.dumps(sensitivity.to_json(), indent=1, allow_nan=False) + "\n").encode()


def read_sensitivity(path: Path) -> Sensitivity:
    """The sensitivities in `path`, which may be anybody's.

    Raises InputMissing, NotPermitted, or BadInput for whatever is damaged or cannot be.
    """
    with open_regular(path) as file:
        raw = file.read(MAX_NBYTES + 1)
    if len(raw) > MAX_NBYTES:
        raise _unusable(path, f"it has more than {MAX_NBYTES} bytes")
    try:
        content = parse_json(raw, path)
    except BadInput as error:
        raise BadInput(error.what, error.why, MEASURE_AGAIN) from None
    try:
        return Sensitivity.from_json(content)
    except (ValueError, OverflowError) as error:
        raise _unusable(path, str(error)) from None


def _unusable(path: Path, why: str) -> BadInput:
    return BadInput(
        f"{printable(path)} is no usable file of sensitivities.",
        f"The reason: {why}.",
        MEASURE_AGAIN,
    )


def _module(name: str, value: object) -> MeasuredModule:
    entry = dict(_typed(value, dict, name))
    shape = tuple(_typed(entry.pop("shape", None), list, f"{name}, shape"))
    return MeasuredModule(shape, _numbers(name, entry))


def _numbers(name: str, entry: dict) -> dict[str, float]:
    """Metrics as floats; JSON has one kind of number, Python two."""
    return {
        metric: float(_typed(value, int | float, f"{name}, {metric}"))
        for metric, value in entry.items()
    }


# --- the model it belongs to ------------------------------------------------------------------


def fingerprint(checkpoint: Checkpoint) -> str:
    """sha256 over every tensor's name, dtype and shape, and the shards' sizes. Reads no weights.

    Weights are not looked at: a fine-tuned model has the fingerprint of its base.
    """
    tensors = sorted((t.name, t.dtype, list(t.shape)) for t in checkpoint.tensors.values())
    shards = sorted(path.stat().st_size for path in {t.path for t in checkpoint.tensors.values()})
    return hashlib.sha256(json.dumps([tensors, shards]).encode()).hexdigest()


def sample_weights(checkpoint: Checkpoint) -> str:
    """sha256 over the first row of every tensor, an adapter's changes included.

    It tells a fine-tuned model from its base, whose fingerprint it has.
    """
    digest = hashlib.sha256()
    with TensorReader() as reader:
        for name, info in sorted(checkpoint.tensors.items()):
            digest.update(name.encode() + b"\0" + reader.read_stored(info, 0, 1).tobytes())
    return digest.hexdigest()


def check_model(sensitivity: Sensitivity, checkpoint: Checkpoint) -> list[str]:
    """Raise BadInput with what differs if another model was measured; return notes for the user."""
    if differing := _differences(sensitivity, checkpoint):
        raise BadInput(
            f"The sensitivities are those of another model than {printable(checkpoint.name)}.",
            "\n".join(f"{line}." for line in differing),
            f"Measure this one: qwq-quant measure {printable(checkpoint.name)} -o sensitivity.json",
        )
    notes = []
    if sensitivity.model["sample"] != sample_weights(checkpoint):
        notes.append(
            f"the sensitivities were measured on {printable(sensitivity.model['name'], 60)}, which "
            "has the same layout, but other weights: a fine-tuned model's are near its base's, no "
            "more"
        )
    measured, here = sensitivity.model["revision"], checkpoint.revision
    if measured and here and measured != here:
        notes.append(
            f"the sensitivities were measured on revision {printable(measured, 40)} of the model, "
            f"this is {printable(here, 40)}; layout and sizes are equal"
        )
    return notes


def _differences(sensitivity: Sensitivity, checkpoint: Checkpoint) -> list[str]:
    """What shows that the model is another, most telling first; empty if nothing does."""
    if sensitivity.model["fingerprint"] == fingerprint(checkpoint):
        return _layout_differences(sensitivity, checkpoint)
    architectures = checkpoint.config.get("architectures")
    here = architectures[0] if isinstance(architectures, list) and architectures else None
    lines = []
    if here != sensitivity.model["architecture"]:
        lines.append(
            f"Architecture: {printable(sensitivity.model['architecture'])} was measured, "
            f"this is {printable(here)}"
        )
    lines += _layout_differences(sensitivity, checkpoint)
    return lines or [
        f"Fingerprint: {printable(sensitivity.model['fingerprint'], 12)} was measured, this is "
        f"{fingerprint(checkpoint)[:11]}…; the layers are alike, but other tensors, dtypes or "
        "sizes of shards are not"
    ]


def _layout_differences(sensitivity: Sensitivity, checkpoint: Checkpoint) -> list[str]:
    here = {group.name: group for group in find_groups(checkpoint.tensors.values())}
    measured = sensitivity.groups
    common = here.keys() & measured.keys()
    shapes = {
        name: (m.shape, checkpoint.tensors[name + ".weight"].shape)
        for name, m in sensitivity.modules.items()
        if name + ".weight" in checkpoint.tensors
    }
    found = {
        "Groups of this model that were not measured": here.keys() - common,
        "Measured groups that this model does not have": measured.keys() - common,
        "Groups that were measured of other modules": {
            name for name in common if here[name] != measured[name]
        },
        "Modules that were measured in another shape": {
            f"{name} ({' x '.join(map(str, then))}, this is {' x '.join(map(str, now))})"
            for name, (then, now) in shapes.items()
            if then != now
        },
    }
    return [f"{what}: {_some(names)}" for what, names in found.items() if names]
