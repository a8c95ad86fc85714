"""RunConfig: every setting of a run, one section a file."""

from dataclasses import dataclass, field

from megaswift.config.checkpoint import CheckpointConfig
from megaswift.config.data import DataConfig
from megaswift.config.embedding import EmbeddingConfig
from megaswift.config.freeze import FreezeConfig
from megaswift.config.launch import LaunchConfig
from megaswift.config.lisa import LisaConfig
from megaswift.config.logging import LoggingConfig
from megaswift.config.model import ModelConfig
from megaswift.config.moe import MoEConfig
from megaswift.config.muon import MuonConfig
from megaswift.config.optimizer import OptimizerConfig
from megaswift.config.parallel import ParallelConfig
from megaswift.config.policy import PolicyConfig
from megaswift.config.precision import PrecisionConfig
from megaswift.config.preference import PreferenceConfig
from megaswift.config.reranker import RerankerConfig
from megaswift.config.reward import RewardConfig
from megaswift.config.rollout import RolloutConfig
from megaswift.config.training import TrainingConfig
from megaswift.config.tuner import TunerConfig
from megaswift.config.vllm import SamplerConfig, VllmConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings of one run; never edited after config/rules.py has resolved them."""

    task: str = "sft"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    tuner: TunerConfig = field(default_factory=TunerConfig)
    freeze: FreezeConfig = field(default_factory=FreezeConfig)
    lisa: LisaConfig = field(default_factory=LisaConfig)
    embedding: EmbeddingConfig = field(default_factory=EmbeddingConfig)
    reranker: RerankerConfig = field(default_factory=RerankerConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
