"""What a run is made of, and how a command line becomes one."""

import dataclasses
import functools
import importlib.util
import inspect
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Annotated, Any, Literal

import optax
import tyro
from jaxtyping import PyTree

from lowbit_jax.data.tokens import TokenDataset
from lowbit_jax.models import Llama, resolve_recipes
from lowbit_jax.models.linear import RecipeRules
from lowbit_jax.models.llama import QUANTIZABLE_PATHS
from lowbit_jax.ops.recipes import DotRecipe


class UsageError(ValueError):
    """The user can mend it with other arguments; a script shows it without a traceback."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run as built objects; `get_config` of a file in `configs/` returns one.

    Attributes:
      model: What to train.
      optimizer: Optax chain, learning rate included.
      learning_rate: The schedule inside `optimizer`, for the records.
      data: Training and validation tokens with their tokenizer.
      steps: Optimizer steps.
      batch_size: Sequences a step.
      seq_len: Tokens a sequence.
      micro_batches: Parts into which a batch is cut to save memory.
      eval_interval: Steps between two validations.
      eval_batches: Batches of each of them.
      final_eval_batches: Batches of the last validation; None: the whole split.
      checkpoint_interval: Steps between two checkpoints.
      keep_checkpoints: How many stay.
      seed: Of initial weights, data order and random bits.
      sample_prompt: Text that the trained model continues; "" for none.
      sample_tokens: Length of the continuation.
      sample_temperature: Below 1 the likelier tokens are preferred; 0 takes the likeliest.
      flops_per_token: Of forward and backward pass, FLOP; None if unknown.
      recipe_schedule: Pairs (step, rules), steps increasing: once that many steps are done, the
        rules take the place of the model's `recipe_rules`. Validation after a step is under the
        rules with which that step was taken, the last one too.
      quantize_once: Quantize the weights once a step, outside the loss, instead of in each layer:
        micro-batches and recomputation share the codes. The same values.
      store: From fresh float32 parameters to those that are stored and updated, with `QTensor`s
        for example; None: as they are.
      clip_norm: Global norm to which gradients are clipped before `optimizer` sees them; None: not.
    """

    model: Llama
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    data: TokenDataset
    steps: int
    batch_size: int
    seq_len: int
    micro_batches: int = 1
    eval_interval: int = 1000
    eval_batches: int = 16
    final_eval_batches: int | None = None
    checkpoint_interval: int = 1000
    keep_checkpoints: int = 2
    seed: int = 0
    sample_prompt: str = ""
    sample_tokens: int = 200
    sample_temperature: float = 0.8
    flops_per_token: int | None = None
    recipe_schedule: tuple[tuple[int, RecipeRules], ...] = ()
    quantize_once: bool = False
    store: Callable[[PyTree], PyTree] | None = None
    clip_norm: float | None = None

    def __post_init__(self):
        for name in ("steps", "batch_size", "seq_len", "micro_batches", "eval_interval",
                     "eval_batches", "final_eval_batches", "checkpoint_interval",
                     "keep_checkpoints"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"Config: {name} must be at least 1, got {value}.")
        if self.clip_norm is not None and not (
            math.isfinite(self.clip_norm) and self.clip_norm > 0
        ):
            raise UsageError(
                f"Config: clip_norm must be finite and above 0, got {self.clip_norm}; None does not"
                " clip."
            )
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"Config: seed must be in [0, 2**32), got {self.seed}.")
        if self.batch_size % self.micro_batches:
            raise UsageError(
                f"Config: batch_size must be a multiple of micro_batches={self.micro_batches},"
                f" got {self.batch_size}."
            )
        switches = [step for step, _ in self.recipe_schedule]
        if switches != sorted(set(switches)) or not all(0 < s < self.steps for s in switches):
            raise UsageError(
                f"Config: steps of recipe_schedule must increase and lie in [1, {self.steps}), got"
                f" {switches}; what holds from the start is the model's own rules."
            )
        try:
            _ = self.phases
        except ValueError as error:  # a rule that matches nothing
            raise UsageError(f"Config: recipe_schedule: {error}") from error
        if self.quantize_once and not any(quantized_weights(model) for _, model in self.phases):
            raise UsageError(
                "Config: quantize_once needs a recipe that quantizes weights, and none does; choose"
                " another recipe or leave it out."
            )

    @property
    def phases(self) -> tuple[tuple[int, Llama], ...]:
        """Steps done when a phase begins, and the model of that phase; the first begins at 0."""
        config = self.model.config
        later = (
            (step, Llama(dataclasses.replace(config, recipe_rules=rules)))
            for step, rules in self.recipe_schedule
        )
        return ((0, self.model), *later)


def quantized_weights(model: Llama) -> tuple[tuple[str, DotRecipe], ...]:
    """Paths of the matrices whose weights `model` quantizes, with their recipes."""
    resolved = resolve_recipes(model.config.recipe_rules, QUANTIZABLE_PATHS)
    return tuple((path, r) for path, (_, r) in resolved.items() if r.y_w is not None)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a run beside its arguments.

    All but `branch_from` and `gradient_exchange` leave what is trained as it is, but for what
    `offload` and `memory_plan` say of random bits.

    Attributes:
      run_dir: Folder of everything that the run writes. None takes runs/ with the name of the
        config and the arguments that are not the defaults, numbered when that run is finished.
      fresh: Start anew: empty the folder given by --run-dir, or take the next number. Otherwise a
        run that was interrupted goes on from its newest checkpoint.
      validate: Measure the validation loss, at intervals and at the end.
      save: Write checkpoints.
      stop_after: Save after this many steps of the whole run and leave, with exit code 0. The same
        command without it goes on, to the bits of a run that never stopped.
      branch_from: Folder of another run, from whose newest checkpoint this one starts: at its
        step, with its weights and optimizer state, under the arguments given here. Both need the
        same shapes. The checkpoint and the metrics up to it are copied, so that the branch resumes
        without the other folder. For variants that differ only late in a run, as strengths of CAGE
        do, whose correction is silent until then.
      mesh: Devices as DATAxFSDPxTENSOR: 4x2x1 cuts a batch over 8 devices, 1x1x4 the matrices over
        4. What is trained is the same up to the order of sums, so that a run may go on on another
        mesh.
      zero: What the devices of data and fsdp share: 1, each keeps its part of the optimizer state;
        2, of the gradients as well; 3, of the weights as well, over fsdp (over data where fsdp has
        one device).
      gradient_exchange: What devices send of their gradients: exact, float32; int8, fp8 or mxfp4,
        rounded at random without bias; or PATTERN=FORMAT joined by commas, the first that matches
        the path of a parameter: layers/.*=mxfp4,int8. With --zero 1 alone: each device has all
        gradients of its tokens before it sends them.
      offload: What waits in pinned host memory and comes to the device a layer at a time: none, or
        flags joined by "+" of moments, weights, gradients and residuals (inputs of blocks, kept for
        the backward pass). A run may go on with other flags; random bits of stochastic rounding in
        the optimizer are then others.
      memory_plan: none trains as configured; auto takes the fastest way that fits into the device's
        memory, and sets recompute, the chunks of the loss and offload, whatever was given for
        them. A run may go on under another plan: what is trained is the same, up to rounding and,
        where the optimizer's arrays are offloaded and rounded stochastically, its random bits.
      memory_gib: Of a device, for the plan; one that does not fit is refused before anything is
        compiled. None: what the device says that it has.
      coordinator: host:port of process 0, for a run in several processes: each is started with this
        command, and gets the devices of all. Under SLURM, Open MPI or Kubernetes none of the three
        is needed.
      processes: How many processes there are.
      process: Which of them this is, from 0.
      sample: Let the trained model continue a prompt, and measure baselines on the same text, at
        the end; a sweep of many runs does without.
    """

    run_dir: str | None = None
    fresh: bool = False
    validate: bool = True
    save: bool = True
    stop_after: int | None = None
    branch_from: str | None = None
    mesh: str = "1x1x1"
    zero: Literal[1, 2, 3] = 1
    gradient_exchange: str = "exact"
    offload: str = "none"
    memory_plan: Literal["none", "auto"] = "none"
    memory_gib: float | None = None
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    sample: bool = True


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What must agree before a run goes on where another stopped.

    Attributes:
      name: Of the configuration, such as "llama_tiny_quest_cage".
      source: Text of the configuration file.
      arguments: All arguments of its `get_config`; a value that JSON lacks counts as its `str`.
      overrides: Those that differ from their defaults.
    """

    name: str
    source: str
    arguments: dict[str, Any]
    overrides: dict[str, Any]

    @property
    def run_name(self) -> str:
        """Name of the folder: the configuration and the arguments that are not the defaults."""
        parts = [f"{key}={_plain(value)}" for key, value in self.overrides.items()]
        name = "-".join([self.name, *parts])
        return re.sub(r"[^A-Za-z0-9._=+-]+", "_", name)[:150]


def parse_command(
    arguments: Sequence[str], prepare: Callable[["RunOptions"], object] = lambda options: None
) -> tuple[Config, RunIdentity, RunOptions]:
    """Reads `CONFIG.py --knob value ...`; the knobs are the arguments of its `get_config`.

    Types, defaults and help texts come from the signature and the docstring of `get_config` and
    from `RunOptions`. `--help` prints them and exits with 0, a flag that does not exist or a
    value of another type prints why and exits with 2.

    Args:
      arguments: Words of the command line.
      prepare: Called with the options before the config is built, which may use the devices.

    Raises:
      UsageError: If there is no such config, or if `get_config` refuses a value.
    """
    if not arguments or arguments[0].startswith("-"):
        wants_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(
            f"usage: {pathlib.Path(sys.argv[0]).name} CONFIG.py [--knob value ...]\n\n"
            f"Configs here: {_known_configs()}.\nCONFIG.py --help explains the knobs of one.",
            file=sys.stdout if wants_help else sys.stderr,
        )
        raise SystemExit(0 if wants_help else 2)
    path = pathlib.Path(arguments[0])
    module = load_config_file(path)
    knobs, options = parse_knobs(path, module, "get_config", RunOptions, arguments[1:])
    defaults = {n: p.default for n, p in inspect.signature(module.get_config).parameters.items()}
    overrides = {name: value for name, value in knobs.items() if value != defaults[name]}
    identity = RunIdentity(path.stem, path.read_text(encoding="utf-8"), knobs, overrides)
    prepare(options)
    try:
        config = module.get_config(**knobs)
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: {error}") from error
    return config, identity, options


def parse_knobs(
    path: pathlib.Path, module: ModuleType, function: str, options: type, arguments: Sequence[str]
) -> tuple[dict[str, Any], Any]:
    """Reads flags for the arguments of a function of `module` and for a dataclass of options.

    Args:
      path: File of the module, for messages.
      module: Its docstring heads the help.
      function: Name of a function whose signature and docstring give names, types, defaults and
        help texts.
      options: A dataclass with a docstring of the same form.
      arguments: Words of the command line after the file.

    Returns:
      All arguments of the function by name, and an instance of `options`.
    """
    described = getattr(module, function)
    described.__doc__ = _unwrap(described.__doc__ or "")  # tyro reads the function behind `wraps`

    @functools.wraps(described)
    def collect(**knobs):
        return knobs

    def command(
        knobs: Annotated[dict, tyro.conf.arg(constructor=collect, name="")],
        options: Annotated[Any, tyro.conf.arg(constructor=options, name="")],
    ) -> tuple[dict, Any]:
        return knobs, options

    return tyro.cli(
        command,
        args=list(arguments),
        prog=f"{pathlib.Path(sys.argv[0]).name} {path}",
        description=module.__doc__ or "",
    )


def load_config_file(path: str | pathlib.Path, function: str = "get_config") -> ModuleType:
    """Imports a file of settings, which must define a function of that name."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise UsageError(f"config: no file {path}; configs here: {_known_configs()}.")
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"config: {path} is not a Python file (.py).")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not isinstance(getattr(module, function, None), Callable):
        raise UsageError(f"config: {path} defines no function {function}(...).")
    return module


def check_data(config: Config, *, needs_validation: bool = True) -> None:
    """Whether the data fit the model and the batch, before anything is compiled.

    Raises:
      UsageError: If a split is too short or the vocabularies differ.
    """
    try:
        config.data.check(
            vocab_size=config.model.config.vocab_size,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            needs_validation=needs_validation,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _unwrap(docstring: str) -> str:
    """Joins the lines of each argument's text; tyro would break them where the source does."""
    return re.sub(
        r"(\n *)(\w+: .*)((?:\1 +\S.*)+)",
        lambda found: found[1] + found[2] + re.sub(r"\s+", " ", found[3]),
        docstring,
    )


def _plain(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _known_configs() -> str:
    return ", ".join(str(p) for p in sorted(pathlib.Path("configs").glob("*.py"))) or "none"
