"""Training: configuration, statistics, loss, loop, checkpoints."""

from carryall.training.config import DataConfig as DataConfig
from carryall.training.config import LearningRateConfig as LearningRateConfig
from carryall.training.config import LossConfig as LossConfig
from carryall.training.config import ModelConfig as ModelConfig
from carryall.training.config import TrainConfig as TrainConfig
from carryall.training.config import read_config as read_config
from carryall.training.loop import TrainResult as TrainResult
from carryall.training.loop import train as train
