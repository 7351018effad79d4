"""The typed, frozen schema of params.yaml: every value with its unit, its limits and the rules between fields.

One long file, as params.yaml is: any value is looked up in one place.
"""

import difflib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

PROFILES = ("smoke", "demo", "single_gpu", "h800")
DATA_STEPS = ("download", "split", "score", "caption", "encode")
TRAIN_STEPS = ("train_image", "train_video", "train_highres")
STRATEGIES = {"torch": ("ddp", "fsdp"), "colossalai": ("ddp", "zero1", "zero2", "gemini")}
STEPS = (*DATA_STEPS, *TRAIN_STEPS, "evaluate", "promote")
# Ends of metrics' names: a video in which nothing moves is highest by the first, and lowest by the second.
STILL = (
    *("flicker", "motion_smoothness", "clip_temporal_consistency"),
    *("temporal_flickering", "subject_consistency", "background_consistency"),  # VBench's
    *("temporal_flickering_still", "motion_smoothness_linear"),  # VBench's without its weights
)
MOTION = ("flow_degree", "dynamic_degree", "dynamic_degree_farneback")

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[int, Field(ge=0)]
Sampler = Literal["iddpm", "ddim", "dpm_solver", "rectified_flow"]


class UserError(RuntimeError):
    """Something the user can mend; the message says what was wrong, what was expected and what to do."""

    exit_code = 1


class ConfigError(UserError):
    """A value of params.yaml or of --set is wrong; the message says which and what was expected."""

    exit_code = 2


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DemoConfig(Section):
    """The embedded world and the tiny models built for it; used by the profiles `smoke` and `demo`."""

    videos: NonNegative = Field(0, description="videos to render; 0: no embedded world, --source is needed")
    shots_per_video: Positive = Field(8, description="shots a video")
    shot_frames: Positive = Field(16, description="frames a shot")
    size: Positive = Field(64, description="pixels, width and height")
    fps: Positive = Field(8, description="frames a second")
    build_models: bool = Field(False, description="train tiny VAE and LLaVA and make a tiny T5 instead of loading")
    vae_steps: NonNegative = Field(0, description="optimizer steps of the tiny VAE")
    llava_steps: NonNegative = Field(0, description="optimizer steps of the tiny LLaVA")


class ExecutorConfig(Section):
    """How the shards of the data steps are worked on; each step says with how many `workers`."""

    kind: Literal["pool", "sequential", "ray"] = Field(
        "pool", description="processes of this machine, this process alone, or Ray Data"
    )
    retries: NonNegative = Field(1, description="tries of a failed shard after the first")
    share: str = Field(
        "",
        pattern=r"^(\d+/[1-9]\d*)?$",
        description="as 3/8: only every 8th shard from the 4th on; empty: the whole step",
    )
    ray_address: str = Field("", description="of a Ray cluster, as in ray://head:10001; empty: this machine")


class DownloadConfig(Section):
    """Bring videos from a folder, a list, an archive, a bucket or a data set."""

    source: str = Field("", description="URI of the videos or of their list; empty: the embedded world")
    list_format: str = Field("", description="form of a published list, as panda70m; empty: by its columns")
    videos: str = Field("", description="folder or URL that the names of a list are below; empty: the list's own")
    shard_videos: Positive = Field(32, description="videos a shard; shards are the unit of work of all data steps")
    workers: Positive = Field(1, description="worker processes")
    connections: Positive = Field(8, description="downloads at once, a worker")
    connections_per_host: Positive = Field(4, description="downloads at once from one host, a worker")
    retries: NonNegative = Field(3, description="tries after the first, with back-off")
    timeout_s: PositiveFloat = Field(60, description="seconds without a byte before a try fails")
    file_timeout_s: PositiveFloat = Field(3600, description="seconds a file at most, over all tries")
    max_mib: Positive = Field(4096, description="MiB, larger files are refused")
    allow_private_hosts: bool = Field(False, description="accept URLs on loopback and private addresses")
    max_bad_share: Share = Field(0.5, description="share of bad videos above which the step fails")


class SplitConfig(Section):
    """Find shots and write them as normalised clips."""

    detector: Literal["content", "adaptive", "transnetv2"] = Field("content", description="what finds the shots")
    threshold: PositiveFloat | None = Field(None, description="of the detector; null: 27, 3 or 0.5 by detector")
    transnetv2_file: str = Field("", description="ONNX file below weights_dir, for the detector transnetv2")
    given_spans: bool = Field(
        True, description="spans that a list names are the clips; false: only their captions count"
    )
    min_shot_s: PositiveFloat = Field(0.625, description="seconds, shorter shots are merged by the detector")
    trim_transitions: bool = Field(True, description="cut dissolves and fades off the ends of shots")
    max_clip_s: PositiveFloat = Field(15.0, description="seconds, longer shots are cut into several clips")
    stride_s: PositiveFloat | None = Field(
        None, description="seconds from clip to clip in a long shot; null: equal parts"
    )
    max_short_side: Positive = Field(512, description="pixels, larger clips are scaled down; never up")
    fps: PositiveFloat | None = Field(None, description="frames a second of the clips; null keeps the source's")
    crf: NonNegative = Field(18, description="x264 quality")
    gop: Positive = Field(30, description="frames between key frames")
    shard_mib: Positive = Field(512, description="MiB a tar file at most")
    video_timeout_s: PositiveFloat = Field(600, description="seconds a video before its worker is killed")
    workers: Positive = Field(2, description="worker processes")
    max_bad_share: Share = Field(0.9, description="share of bad videos above which the step fails")


class ScoreConfig(Section):
    """Score every clip, then drop by threshold; null disables a threshold."""

    min_duration_s: float | None = Field(0.5, description="seconds")
    min_short_side: int | None = Field(64, description="pixels")
    max_black: float | None = Field(0.9, description="share of nearly black pixels")
    min_brightness: float | None = Field(None, description="mean grey level, 0…255")
    max_brightness: float | None = Field(None, description="mean grey level, 0…255")
    min_motion: float | None = Field(None, description="mean optical flow, share of the frame's diagonal a second")
    max_motion: float | None = Field(None, description="mean optical flow, share of the frame's diagonal a second")
    min_frame_difference: float | None = Field(0.2, description="mean absolute change in 1/8 s, 0…255")
    min_sharpness: float | None = Field(None, description="variance of the Laplacian at 256 pixels")
    max_duplicate_distance: int | None = Field(None, description="bits of a 64-bit hash; null keeps duplicates")
    clip: str = Field("", description="CLIP model, folder below weights_dir; empty: neither of the next two")
    aesthetic_head: str = Field("", description="linear or MLP head over CLIP's image features, file below weights_dir")
    min_aesthetic: float | None = Field(None, description="aesthetic score, about 1…10")
    min_text_match: float | None = Field(None, description="cosine of CLIP's features of frames and caption")
    workers: Positive = Field(2, description="worker processes")


class CaptionConfig(Section):
    """Caption clips with LLaVA; given captions are kept."""

    backend: Literal["llava", "endpoint"] = Field(
        "llava", description="in this process, or an OpenAI-compatible server"
    )
    model: str = Field("llava", description="folder below weights_dir, or the server's name of its model")
    endpoint: str = Field("", description="base URL of the server, as in http://localhost:8000/v1")
    concurrency: Positive = Field(32, description="requests at once, a worker")
    request_timeout_s: PositiveFloat = Field(120, description="seconds a request")
    retries: NonNegative = Field(4, description="tries of a request after the first, with back-off")
    caption_retries: NonNegative = Field(1, description="tries after an empty, cut-off or refused caption")
    prompt: str = Field("describe", description="what the model is asked")
    frame_positions: tuple[Share, ...] = Field((0.2, 0.5, 0.8), description="positions of the frames shown")
    max_side: Positive = Field(672, description="pixels, larger frames are scaled down for the server")
    batch_size: Positive = Field(32, description="clips at once, backend llava")
    max_new_tokens: Positive = Field(256, description="tokens a caption at most")
    retry_temperature: Annotated[float, Field(ge=0)] = Field(0.7, description="of the tries after the first")
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: Positive = Field(2, description="CPU threads a worker, also those that read frames ahead")
    workers: Positive = Field(1, description="worker processes; with GPUs one a GPU")
    max_bad_share: Share = Field(
        0.5, description="share of clips without a caption in the end, of those that came with none"
    )


class EncodeConfig(Section):
    """VAE latents of all frames and text embeddings into shards."""

    vae: str = Field("vae", description="folder below weights_dir")
    text_encoder: str = Field("t5", description="folder below weights_dir")
    sizes: tuple[tuple[Positive, Positive], ...] = Field(((256, 256),), description="height, width in pixels")
    max_tokens: Positive = Field(120, description="text tokens")
    batch_frames: Positive | None = Field(None, description="frames the VAE encodes at once; null: by their size")
    shard_mib: Positive = Field(512, description="MiB a safetensors file at most")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="in which the models compute")
    store_dtype: Literal["float16", "bfloat16"] = Field("float16", description="in which the shards are written")
    threads: Positive = Field(1, description="CPU threads a worker")
    workers: Positive = Field(1, description="worker processes; with GPUs one a GPU")


class ModelConfig(Section):
    """Shape of the STDiT that all stages share."""

    hidden_size: Positive = 1152
    depth: Positive = 28
    num_heads: Positive = 16
    mlp_ratio: PositiveFloat = 4.0
    patch_size: tuple[Positive, Positive, Positive] = (1, 2, 2)
    in_channels: Positive = Field(4, description="latent channels of the VAE")
    caption_channels: Positive = Field(4096, description="width of the text encoder")
    model_max_length: Positive = Field(120, description="text tokens")
    class_dropout_prob: Share = Field(0.1, description="share of captions dropped in training")
    pred_sigma: bool = Field(True, description="predict the variance too (IDDPM)")
    caption_init_std: float | None = Field(0.02, description="null: xavier, which small models need")


class BucketConfig(Section):
    """A further shape of samples in a stage; every batch holds one shape."""

    frames: Positive
    height: Positive = Field(description="pixels")
    width: Positive = Field(description="pixels")
    batch_size: Positive = Field(description="samples a process")
    frame_interval: Positive = Field(1, description="clip frames from one sampled frame to the next")


class TrainConfig(Section):
    """One stage of training. Batch size and lr are those of one process and of the whole run."""

    frames: Positive = Field(16, description="frames a sample; 1 trains on images")
    frame_interval: Positive = Field(1, description="clip frames from one sampled frame to the next")
    height: Positive = Field(256, description="pixels")
    width: Positive = Field(256, description="pixels")
    batch_size: Positive = Field(8, description="samples a process and micro-batch")
    buckets: tuple[BucketConfig, ...] = Field((), description="further shapes, for clips that fit them better")
    image_share: Share = Field(0.0, description="share of the steps on single frames (joint image-video training)")
    image_batch_size: Positive = Field(8, description="single frames a process and micro-batch in those steps")
    accumulate: Positive = Field(1, description="micro-batches a step, whose gradients are averaged")
    steps: Positive = Field(1000, description="optimizer steps")
    lr: PositiveFloat = Field(2e-5, description="peak learning rate")
    warmup_steps: NonNegative = Field(0, description="steps of linear warm-up")
    decay_share: Share = Field(0.0, description="last share of the steps, over which lr falls linearly to 0")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: PositiveFloat = Field(1.0, description="gradient norm limit")
    ema_decay: Share = Field(0.9999, description="a step")
    trainable: Literal["all", "temporal", "no_text"] = Field(
        "all", description="what learns: everything, the temporal attention alone, all but what reads the text"
    )
    objective: Literal["rectified_flow", "iddpm"] = "iddpm"
    shift: PositiveFloat = Field(1.0, description="timestep shift of rectified flow")
    space_scale: PositiveFloat = Field(1.0, description="spatial positions are divided by it")
    time_scale: PositiveFloat = Field(1.0, description="temporal positions are divided by it")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16 keeps float32 master weights")
    engine: Literal["torch", "colossalai"] = "torch"
    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "gemini"] = Field(
        "ddp",
        description="what processes share: nothing (ddp), or shards; fsdp is torch's, the last three ColossalAI's",
    )
    sequence_parallel: Positive = Field(1, description="processes that share one sample")
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="recompute in the backward pass: nothing, what is cheap (norms, activations), whole blocks"
    )
    compile: bool = Field(False, description="compile the model's blocks by torch.compile")
    processes: Positive = Field(1, description="processes of the run (GPUs, or gloo processes on CPU)")
    threads: Positive = Field(1, description="CPU threads a process")
    data: Literal["latents", "clips"] = Field("latents", description="encoded by `encode`, or encoded in the step")
    loader_workers: NonNegative = Field(0, description="processes that read data ahead, a training process")
    loader_restarts: NonNegative = Field(3, description="times that reading processes which died are started again")
    init_from: str = Field("", description="weights to start from; empty: the stage before, or from scratch")
    log_every: Positive = Field(10, description="steps")
    sample_every: NonNegative = Field(0, description="steps from one set of samples to the next; 0: none")
    sample_prompts: tuple[str, ...] = Field((), description="prompts of the samples that training makes of itself")
    checkpoint_every: Positive = Field(500, description="steps")
    keep_checkpoints: Positive = Field(2, description="newest checkpoints kept")
    keep_every: NonNegative = Field(0, description="steps; checkpoints at its multiples are kept for good; 0: none")
    spike_deviations: PositiveFloat | None = Field(
        8.0,
        description="a step is skipped whose logarithm of the gradient norm is that far above its mean; null: none",
    )
    max_bad_steps: Positive = Field(5, description="skipped steps in a row before the run rolls back")
    max_rollbacks: NonNegative = Field(
        3, description="times that a run goes back to a good checkpoint past the bad data"
    )
    stall_timeout_s: Positive = Field(600, description="seconds without a step before a stalled process is named")
    join_timeout_s: Positive = Field(600, description="seconds in which all processes must arrive")
    seed: NonNegative = 0


class HardwareConfig(Section):
    """What training runs on, for plans and the meter."""

    gpu: str = Field("", description="kind of GPU, as h800; empty: the one that is there, or none")
    gpus_per_node: Positive = 8
    dollars_per_gpu_hour: PositiveFloat | None = Field(None, description="null: the kind's usual price")
    utilization: Share = Field(0.15, description="share of the GPU's peak that a plan counts on")


class EvaluateConfig(Section):
    """Generate fixed prompts with every stage and measure."""

    prompts: tuple[str, ...] = Field((), description="prompts; with none here or in the file all of the embedded world")
    prompts_file: str = Field(
        "", description="file with a prompt a line, after those of `prompts`; or VBench_full_info.json, without others"
    )
    sampler: Sampler | None = Field(None, description="null: the one of the training's objective")
    steps: Positive = Field(30, description="sampling steps")
    guidance: PositiveFloat = Field(4.0, description="classifier-free guidance scale")
    guidance_mode: Literal["v1", "full"] | None = Field(
        None, description="v1 guides three of four channels as released models do; null: v1 for iddpm and ddim"
    )
    batch_size: Positive = Field(16, description="videos at once")
    fps: Positive = Field(8, description="frames a second of the samples")
    processes: Positive = Field(
        1, description="processes that share the prompts; each takes a GPU where there are some"
    )
    seed: NonNegative = 0
    reference_clips: NonNegative = Field(
        256, description="clips of one's own that generated ones are compared with; 0: none"
    )
    videomae: str = Field("", description="folder below weights_dir: VideoMAE, for fvd_videomae; empty: not measured")
    i3d: str = Field("", description="state dict below weights_dir: I3D, for fvd_i3d; empty: not measured")
    inception: str = Field(
        "",
        description="below weights_dir: Inception's state dict, for fid_inception, or the folder of another encoder of "
        "images, after which its FID is named; empty: not measured",
    )
    clip: str = Field("", description="folder below weights_dir: CLIP, for clip_score; empty: not measured")
    vbench: str = Field("", description="python of an environment with vbench installed; empty: not run")


Finite = Annotated[float, Field(allow_inf_nan=False)]


class Gate(Section):
    """One metric that promotion guards."""

    metric: str = Field(description="name in metrics.json")
    direction: Literal["higher", "lower"] = "higher"
    floor: Finite | None = Field(None, description="absolute limit, which every model must reach; null: none")
    tolerance: Annotated[Finite, Field(ge=0)] | None = Field(
        None,
        description="how much worse than the champion is accepted, of what `evaluate` measures of it beside the "
        "candidate: train_highres_… and prompt_following_…; null: not compared",
    )

    @model_validator(mode="after")
    def _says_something(self) -> "Gate":
        if self.floor is None and self.tolerance is None:
            raise ValueError(f"the gate on {self.metric} has neither a floor nor a tolerance, and would let all pass")
        return self


class Primary(Section):
    """The score by which a candidate has to beat the champion, prompt by prompt."""

    score: str = Field(description="name of a prompt's score in scores.json, of the last stage")
    direction: Literal["higher", "lower"] = "higher"
    margin: Finite = Field(
        0.0,
        description="above which the 95 % interval of the mean difference to the champion must lie; 0: better at all; "
        "negative: so much worse is accepted",
    )


class PromoteConfig(Section):
    """The gate, as data."""

    gates: tuple[Gate, ...] = ()
    primary: Primary | None = Field(None, description="null: a model as good as the champion may replace it")
    replace_lost_champion: bool = Field(
        False, description="where the champion's files or alias are gone, or it cannot be run, floors alone decide"
    )
    accept_other_shape: bool = Field(
        False, description="where the champion's clips have other frames or another size, floors alone decide"
    )

    @model_validator(mode="after")
    def _distinct(self) -> "PromoteConfig":
        names = [gate.metric for gate in self.gates]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"promote.gates names {', '.join(twice)} more than once; write one gate a metric")
        return self

    @model_validator(mode="after")
    def _asks_for_motion(self) -> "PromoteConfig":
        """A frozen video must not pass by what it is perfect in."""
        asked = [(gate.metric, gate.direction, _stage_of(gate.metric)) for gate in self.gates]
        if self.primary:
            asked.append((self.primary.score, self.primary.direction, TRAIN_STEPS[-1]))
        floors = {gate.metric for gate in self.gates if gate.direction == "higher" and (gate.floor or 0) > 0}
        moving = {_stage_of(name) for name in floors if name.endswith(MOTION)}
        for name, direction, stage in asked:
            if name.endswith(STILL if direction == "higher" else MOTION) and stage not in moving:
                prefix = f"{stage}_" if stage else ""
                raise ValueError(
                    f"promote lets a video pass in which nothing moves, which is perfect in {name}; add a gate with a "
                    f"floor above 0 on {prefix}flow_degree or {prefix}dynamic_degree"
                )
        return self


def _stage_of(metric: str) -> str:
    """The stage that a name in metrics.json begins with; empty for what is not of one stage."""
    return next((stage for stage in TRAIN_STEPS if metric.startswith(f"{stage}_")), "")


class Config(Section):
    """A resolved profile."""

    profile: Literal["smoke", "demo", "single_gpu", "h800"]
    weights_dir: str = Field("weights", description="folder of pretrained weights")
    offline: bool = Field(True, description="never open a connection for weights")
    executor: ExecutorConfig
    demo: DemoConfig
    download: DownloadConfig
    split: SplitConfig
    score: ScoreConfig
    caption: CaptionConfig
    encode: EncodeConfig
    model: ModelConfig
    hardware: HardwareConfig
    train_image: TrainConfig
    train_video: TrainConfig
    train_highres: TrainConfig
    evaluate: EvaluateConfig
    promote: PromoteConfig

    @model_validator(mode="after")
    def _rules(self) -> "Config":
        sizes, a_node = set(self.encode.sizes), self.hardware.gpus_per_node
        for name in TRAIN_STEPS:
            stage: TrainConfig = getattr(self, name)
            shapes: tuple[TrainConfig | BucketConfig, ...] = (stage, *stage.buckets)
            for shape in shapes:
                if (shape.height, shape.width) not in sizes:
                    raise ValueError(
                        f"{name} trains at {shape.height}x{shape.width}, "
                        f"which encode.sizes {sorted(sizes)} does not hold"
                    )
            if stage.strategy not in STRATEGIES[stage.engine]:
                raise ValueError(
                    f"{name}.strategy {stage.strategy} is not one of engine {stage.engine}: "
                    f"{', '.join(STRATEGIES[stage.engine])}"
                )
            if stage.sample_every and not stage.sample_prompts:
                raise ValueError(f"{name}.sample_every needs {name}.sample_prompts")
            if stage.objective == "iddpm" and not self.model.pred_sigma:
                raise ValueError(f"{name}.objective is iddpm, which needs model.pred_sigma: true")
            if stage.processes % stage.sequence_parallel:
                raise ValueError(f"{name}.processes must be a multiple of {name}.sequence_parallel")
            if stage.processes > a_node and stage.processes % a_node:
                fewer = stage.processes // a_node * a_node
                raise ValueError(
                    f"{name}.processes is {stage.processes}, which fills no whole number of nodes of "
                    f"hardware.gpus_per_node {a_node} GPUs; take {fewer} or {fewer + a_node}"
                )
        if self.split.detector == "transnetv2" and not self.split.transnetv2_file:
            raise ValueError(
                "split.detector is transnetv2, which needs split.transnetv2_file, a file below weights_dir"
            )
        if self.score.min_aesthetic is not None and not (self.score.clip and self.score.aesthetic_head):
            raise ValueError("score.min_aesthetic needs score.clip and score.aesthetic_head")
        if self.score.min_text_match is not None and not self.score.clip:
            raise ValueError("score.min_text_match needs score.clip")
        if self.caption.backend == "endpoint" and not self.caption.endpoint:
            raise ValueError("caption.backend is endpoint, which needs caption.endpoint, as http://localhost:8000/v1")
        if self.train_image.frames != 1:
            raise ValueError(f"train_image.frames must be 1, got {self.train_image.frames}")
        if self.model.model_max_length != self.encode.max_tokens:
            raise ValueError(
                f"model.model_max_length {self.model.model_max_length} and encode.max_tokens "
                f"{self.encode.max_tokens} must be equal"
            )
        for gate in self.promote.gates:
            again = (f"{TRAIN_STEPS[-1]}_", "prompt_following_")
            if gate.tolerance is not None and not gate.metric.startswith(again):
                raise ValueError(
                    f"promote.gates compares {gate.metric} with the champion's, of which only {again[0]}… and "
                    f"{again[1]}… are measured again beside a candidate; give it a floor, and null as its tolerance"
                )
        if self.model.hidden_size % self.model.num_heads or self.model.hidden_size % 4:
            raise ValueError("model.hidden_size must be a multiple of model.num_heads and of 4")
        return self


def load_config(path: Path, profile: str | None = None, overrides: tuple[str, ...] = ()) -> Config:
    """Resolve a profile of params.yaml.

    Args:
        path: params.yaml.
        profile: None takes the file's own `profile`.
        overrides: `section.key=value` texts, values in YAML form.

    Raises:
        ConfigError: the file, the profile, a key or a value is wrong.
    """
    if not path.is_file():
        raise ConfigError(f"no parameter file at {path}; run inside the project's folder or give --params FILE")
    try:
        document = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(document, dict) or "base" not in document:
        raise ConfigError(f"{path} has no section `base`")
    profile = profile or str(document.get("profile", ""))
    if profile not in PROFILES:
        raise ConfigError(f"unknown profile {profile!r}{nearest(profile, PROFILES)}; one of {', '.join(PROFILES)}")
    if profile not in document:
        raise ConfigError(f"{path} has no section for the profile {profile!r}")
    values = merge(merge(document["base"], document[profile]), parse_overrides(overrides))
    return build_config({"profile": profile, **values})


def build_config(values: dict[str, object]) -> Config:
    """Validate a resolved mapping; errors are one line each and name the nearest known key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(detail) for detail in error.errors())) from error


def merge(base: dict, over: dict | None) -> dict:
    """`over` laid on `base`, mappings merged, everything else replaced."""
    result = dict(base)
    for key, value in (over or {}).items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def parse_overrides(texts: tuple[str, ...]) -> dict:
    """The values of several `section.key=value` texts; the last one wins."""
    values: dict = {}
    for text in texts:
        values = merge(values, parse_override(text))
    return values


def parse_override(text: str) -> dict:
    """`train_video.lr=2e-5` -> {"train_video": {"lr": 2e-5}}."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set {text!r}: expected section.key=value, as in train_video.lr=2e-5")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: {value!r} is not a YAML value") from None
    if isinstance(parsed, str):  # YAML 1.1 reads 2e-5, without a point, as text
        with suppress(ValueError):
            parsed = float(parsed)
    for part in reversed(name.split(".")):
        parsed = {part: parsed}
    return parsed


def one_of(option: str, value: Any, known: tuple[str, ...]) -> Any:
    """`value`, if it is None or known; raises ConfigError otherwise."""
    if value is not None and value not in known:
        raise ConfigError(f"{option} {value!r}{nearest(value, known)}: one of {', '.join(known)} was expected")
    return value


def nearest(name: str, known: tuple[str, ...] | list[str]) -> str:
    """ "; did you mean …?" for the known name most like `name`, or nothing."""
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def _explain(detail: Mapping) -> str:
    where = [str(part) for part in detail["loc"]]
    name = ".".join(where) or "params"
    if detail["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for part in where[:-1]:
            field = section.model_fields.get(part)
            if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
                return f"unknown key {name}"
            section = field.annotation
        return f"unknown key {name}{nearest(where[-1], list(section.model_fields))}"
    message = detail["msg"].removeprefix("Value error, ")
    return message if not where else f"{name}: {message}, got {detail['input']!r}"
