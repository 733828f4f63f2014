"""adapter_config.json: what a tenant may say in it, and the file that is written instead.

The tenant's file is never kept. What vLLM 0.32 (`vllm/lora/peft_helper.py`) and PEFT 0.21 read is taken from
it field by field, checked, and written anew; a field that could change the adapter's meaning and is not known
here is refused.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from adapter_store.base_model import BaseModel
from adapter_store.bounded_json import JsonInvalid, parse
from adapter_store.bundle_files import CONFIG_FILE
from adapter_store.faults import Bounds, FaultCode, Faults, brief, listing

T = TypeVar("T")

MAX_DEPTH = 6
MAX_ITEMS = 8_192
# An alpha past this scales any rank out of the bound on values; real ones are below 1,000.
MAX_ALPHA = 65_536.0
# vLLM matches every module against every key, inside the engine loop.
MAX_PATTERNS = 256
# These change only how the weights were first set (vLLM 0.32 has the same list).
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica", "lora_ga"})

READ_FIELDS = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
        "bias",
        "target_modules",
    }
    | {"rank_pattern", "alpha_pattern", "init_lora_weights"}
)
# Training, bookkeeping, or how the weights were first set: no say in what the weights mean.
IGNORED_FIELDS = frozenset(
    {"auto_mapping", "ensure_weight_tying", "eva_config", "inference_mode", "lora_dropout", "lora_ga_config"}
    | {"megatron_core", "peft_version", "qalora_group_size", "revision", "unsloth_fixed"}
)
SAVE_AGAIN = "model.save_pretrained(OUT) writes it anew"
NEAREST = "peft.save_as_lora(OUT, model, rank=R) writes the nearest plain LoRA"
RETRAIN = "it has no conversion: train again with peft.LoraConfig"
# PEFT 0.21's additive methods: the ones whose layers say `supports_lora_conversion`.
CONVERTIBLE_TYPES = frozenset(
    {"C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "SHIRA"}
    | {"TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"}
)
# https://huggingface.co/docs/peft, "PiSSA" and "OLoRA": what was trained is the difference to the first weights.
CONVERT_INIT = (
    "model.save_pretrained('init') before training, then "
    "model.save_pretrained(OUT, path_initial_model_for_weight_conversion='init') writes a plain LoRA of twice the rank "
    "for the unchanged base; without it train again with init_lora_weights=True"
)
CONVERT_LOFTQ = (
    "it belongs to a quantized base that is not served: train again with peft.LoraConfig(init_lora_weights=True)"
)
LIST_PATHS = "list the full paths in target_modules (model.targeted_module_names) and set this to null: no retraining"
# Field → (code, hint); each must be absent, null, false or empty.
UNSUPPORTED_FIELDS: Mapping[str, tuple[FaultCode, str]] = {
    "use_dora": (
        FaultCode.DORA_UNSUPPORTED,
        "train again with peft.LoraConfig(use_dora=False): peft.save_as_lora would lose its magnitudes",
    ),
    "lora_bias": (FaultCode.BIAS_UNSUPPORTED, "train again with peft.LoraConfig(lora_bias=False)"),
    "alora_invocation_tokens": (
        FaultCode.ALORA_UNSUPPORTED,
        "it acts only after its tokens: train again with peft.LoraConfig(alora_invocation_tokens=None)",
    ),
    "modules_to_save": (
        FaultCode.MODULES_TO_SAVE_UNSUPPORTED,
        "tenants share one base: train again with peft.LoraConfig(modules_to_save=None)",
    ),
    "trainable_token_indices": (
        FaultCode.TOKENS_UNSUPPORTED,
        "tenants share one vocabulary: train again with peft.LoraConfig(trainable_token_indices=None)",
    ),
    "layer_replication": (
        FaultCode.LAYER_REPLICATION_UNSUPPORTED,
        "tenants share one base: train again with peft.LoraConfig(layer_replication=None)",
    ),
    "layers_to_transform": (FaultCode.LAYER_SELECTION_UNSUPPORTED, LIST_PATHS),
    "layers_pattern": (FaultCode.LAYER_SELECTION_UNSUPPORTED, LIST_PATHS),
    "exclude_modules": (FaultCode.LAYER_SELECTION_UNSUPPORTED, LIST_PATHS),
    "target_parameters": (
        FaultCode.TARGET_PARAMETERS_UNSUPPORTED,
        "train again with peft.LoraConfig(target_modules=[...]) and no target_parameters",
    ),
    "loftq_config": (FaultCode.INIT_UNSUPPORTED, CONVERT_LOFTQ),
    "corda_config": (FaultCode.INIT_UNSUPPORTED, CONVERT_INIT),
    "fan_in_fan_out": (
        FaultCode.VARIANT_UNSUPPORTED,
        "this base model's layers are (out, in): train again with peft.LoraConfig(fan_in_fan_out=False)",
    ),
    "megatron_config": (
        FaultCode.VARIANT_UNSUPPORTED,
        "train again with peft.LoraConfig(megatron_config=None)",
    ),
    "use_qalora": (FaultCode.VARIANT_UNSUPPORTED, "train again with peft.LoraConfig(use_qalora=False)"),
    "use_bdlora": (FaultCode.VARIANT_UNSUPPORTED, "train again with peft.LoraConfig(use_bdlora=None)"),
    "arrow_config": (FaultCode.VARIANT_UNSUPPORTED, "publish each of the routed adapters by itself"),
    "kasa_config": (FaultCode.VARIANT_UNSUPPORTED, "it changes the base: train again with peft.LoraConfig()"),
    "monteclora_config": (
        FaultCode.VARIANT_UNSUPPORTED,
        "train again with peft.LoraConfig(monteclora_config=None)",
    ),
    "velora_config": (FaultCode.VARIANT_UNSUPPORTED, "train again with peft.LoraConfig(velora_config=None)"),
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The checked config: `modules` are full paths, the patterns keep their order (the first match wins)."""

    r: int
    lora_alpha: float
    use_rslora: bool
    modules: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """What B is multiplied by: alpha / r, or alpha / √r with rsLoRA (https://arxiv.org/abs/2312.03732)."""
        rank = self.rank(module)
        return _first_match(self.alpha_pattern, module, self.lora_alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )

    def to_json(self, base_name: str) -> bytes:
        """The canonical file: the same adapter gives the same bytes."""
        members = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": self.r,
            "lora_alpha": int(self.lora_alpha) if self.lora_alpha.is_integer() else self.lora_alpha,
            "use_rslora": self.use_rslora,
            "bias": "none",
            "init_lora_weights": True,
            "inference_mode": True,
            "target_modules": list(self.modules),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }
        return json.dumps(members, indent=1).encode()


def read_members(data: bytes, faults: Faults) -> dict[str, object] | None:
    """The tenant's file as JSON, or None and a fault."""
    try:
        members = parse(data, max_depth=MAX_DEPTH, max_items=MAX_ITEMS)
    except JsonInvalid as error:
        faults.add(FaultCode.CONFIG_NOT_JSON, CONFIG_FILE, str(error), "a JSON object in UTF-8", SAVE_AGAIN)
        return None
    if not isinstance(members, dict):
        faults.add(FaultCode.CONFIG_NOT_JSON, CONFIG_FILE, brief(members), "a JSON object", SAVE_AGAIN)
        return None
    return members


def check_config(members: dict[str, object], base: BaseModel, bounds: Bounds, faults: Faults) -> LoraConfig | None:
    """Every fault is added to `faults`. None where the tensors cannot be compared with it.

    A faulty alpha, bias or init leaves ranks and modules as they are: they are compared all the same, so that
    faults of both files are told at once.
    """
    checker = _Checker(members, base, bounds, faults)
    if not checker.check_kind():
        return None
    checker.check_init()
    checker.check_features()
    return checker.read()


def check_base_name(members: dict[str, object], base: BaseModel, faults: Faults) -> None:
    """For weights without a fingerprint: the last part of the name that PEFT wrote must be the base's."""
    field = "base_model_name_or_path"
    named = members.get(field)
    if isinstance(named, str) and named and _last_part(named) != _last_part(base.name):
        hint = f"if it really was trained on this base, set {field} to '{base.name}'"
        faults.add(FaultCode.BASE_MISMATCH, CONFIG_FILE, brief(named), f"'{base.name}'", hint, field=field)


class _Checker:
    """One pass over the members of one config; a faulty field is told and stands in as a harmless value."""

    def __init__(self, members: dict[str, object], base: BaseModel, bounds: Bounds, faults: Faults) -> None:
        self.members = members
        self.base = base
        self.bounds = bounds
        self.faults = faults

    def fault(self, code: FaultCode, field: str, found: object, expected: str, hint: str = "") -> None:
        self.faults.add(code, CONFIG_FILE, brief(found), expected, hint, field=field)

    def check_kind(self) -> bool:
        """False for another of PEFT's methods, whose fields and tensors are others altogether."""
        kind, task, bias = (self.members.get(field) for field in ("peft_type", "task_type", "bias"))
        if kind != "LORA":
            convertible = isinstance(kind, str) and kind.upper() in CONVERTIBLE_TYPES
            self.fault(FaultCode.NOT_LORA, "peft_type", kind, "'LORA'", NEAREST if convertible else RETRAIN)
            if isinstance(kind, str):
                return False
        if task not in (None, "CAUSAL_LM"):
            hint = "train again with peft.LoraConfig(task_type='CAUSAL_LM')"
            self.fault(FaultCode.TASK_UNSUPPORTED, "task_type", task, "'CAUSAL_LM'", hint)
        if bias not in (None, "none"):
            hint = "train again with peft.LoraConfig(bias='none')"
            self.fault(FaultCode.BIAS_UNSUPPORTED, "bias", bias, "'none'", hint)
        if not isinstance(self.members.get("base_model_name_or_path"), str | None):
            found = self.members["base_model_name_or_path"]
            self.fault(FaultCode.FIELD_INVALID, "base_model_name_or_path", found, "a string", "name the base model")
        return True

    def check_init(self) -> None:
        init = self.members.get("init_lora_weights")
        if init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in PLAIN_INITS):
            return
        expected = "true, false or one of " + listing(PLAIN_INITS)
        hint = CONVERT_LOFTQ if isinstance(init, str) and init.lower() == "loftq" else CONVERT_INIT
        self.fault(FaultCode.INIT_UNSUPPORTED, "init_lora_weights", init, expected, hint)

    def check_features(self) -> None:
        for field, value in self.members.items():
            if field in READ_FIELDS or field in IGNORED_FIELDS or _unset(value):
                continue
            code, hint = UNSUPPORTED_FIELDS.get(
                field, (FaultCode.FIELD_UNKNOWN, "remove it if it has no effect on the weights")
            )
            self.fault(code, field, value, "null, false or empty", hint)

    def read(self) -> LoraConfig | None:
        """None where ranks or modules are not known."""
        lora_alpha = self.alpha("lora_alpha", self.members.get("lora_alpha"))
        alpha_pattern = self.pattern("alpha_pattern", self.alpha)
        use_rslora = self.flag("use_rslora")
        before = len(self.faults)
        r = self.rank("r", self.members.get("r"))
        rank_pattern = self.pattern("rank_pattern", self.rank)
        modules = self.target_modules()
        if len(self.faults) > before:
            return None
        return LoraConfig(r, lora_alpha, use_rslora, modules, rank_pattern, alpha_pattern)

    def rank(self, field: str, value: object) -> int:
        if type(value) is not int or value < 1:
            hint = "r is the number of rows of each lora_A"
            self.fault(FaultCode.RANK_INVALID, field, value, "a whole number of 1 or more", hint)
            return 1
        if value > self.bounds.max_rank:
            hint = (
                f"peft.save_as_lora(OUT, model, rank={self.bounds.max_rank}) writes the nearest LoRA of that rank; "
                "or ask the operator for a higher maximum"
            )
            self.fault(FaultCode.RANK_TOO_HIGH, field, value, f"at most {self.bounds.max_rank}", hint)
            return 1
        return value

    def alpha(self, field: str, value: object) -> float:
        if type(value) in (int, float) and 0 < value <= MAX_ALPHA:  # type: ignore[operator]
            return float(value)  # type: ignore[arg-type]
        hint = "write the lora_alpha that it was trained with"
        self.fault(FaultCode.ALPHA_INVALID, field, value, f"a number above 0, at most {MAX_ALPHA:g}", hint)
        return 1.0

    def flag(self, field: str) -> bool:
        value = self.members.get(field)
        if not isinstance(value, bool | None):
            self.fault(FaultCode.FIELD_INVALID, field, value, "true or false", "write what it was trained with")
        return value is True

    def target_modules(self) -> tuple[str, ...]:
        """The full paths that PEFT selects: a name selects itself and every module that ends in `.<name>`."""
        value = self.members.get("target_modules")
        if value == "all-linear":
            return tuple(self.base.modules)
        if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
            hint = "a string is a regular expression to PEFT: list what it matched (model.targeted_module_names)"
            expected = "'all-linear' or a list of module names"
            self.fault(FaultCode.TARGET_MODULES_INVALID, "target_modules", value, expected, hint)
            return ()
        known = _suffixes(self.base.modules)
        for name in value:
            if name not in known:
                expected = "a linear layer of the base: " + listing({path.rpartition(".")[2] for path in known})
                hint = "it is not among the layers that adapters may change here: remove it, or train again without it"
                self.fault(FaultCode.TARGET_MODULE_UNKNOWN, "target_modules", name, expected, hint)
        wanted = set(value)
        return tuple(path for path in self.base.modules if not wanted.isdisjoint(_suffixes((path,))))

    def pattern(self, field: str, read: Callable[[str, object], T]) -> dict[str, T]:
        """Keys are regular expressions to PEFT and vLLM, so only names that stand for themselves may pass."""
        value = self.members.get(field)
        if value is None:
            return {}
        if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
            expected = f"an object of at most {MAX_PATTERNS} module names"
            hint = "write an object of names, or leave it out"
            self.fault(FaultCode.PATTERN_INVALID, field, value, expected, hint)
            return {}
        known = _suffixes(self.base.modules)
        for key in value:
            if key not in known:
                hint = "write the module's name or path, without regular expressions"
                self.fault(FaultCode.PATTERN_INVALID, field, key, "a linear layer of the base", hint)
        return {key: read(f"{field}.{key}", item) for key, item in value.items() if key in known}


def _suffixes(paths: Iterable[str]) -> frozenset[str]:
    """Every end of every path that starts at a dot: a.b.c → a.b.c, b.c, c."""
    parts = (path.split(".") for path in paths)
    return frozenset(".".join(names[start:]) for names in parts for start in range(len(names)))


def _first_match(pattern: Mapping[str, T], module: str, default: T) -> T:
    """PEFT's get_pattern_key for literal keys: the first that equals the module's path or an end of it."""
    for key, value in pattern.items():
        if module == key or module.endswith(f".{key}"):
            return value
    return default


def _unset(value: object) -> bool:
    return value is None or value is False or value in ("", [], {})


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
