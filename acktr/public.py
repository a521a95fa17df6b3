"""The public names of the package, which ``acktr`` imports when the first of them is asked for."""

from acktr.agent import A2C as A2C
from acktr.agent import ACKTR as ACKTR
from acktr.agent import TRPO as TRPO
from acktr.algorithms import A2CUpdate as A2CUpdate
from acktr.algorithms import ACKTRUpdate as ACKTRUpdate
from acktr.algorithms import Auxiliary as Auxiliary
from acktr.algorithms import TRPOUpdate as TRPOUpdate
from acktr.config import A2CConfig as A2CConfig
from acktr.config import ACKTRConfig as ACKTRConfig
from acktr.config import Config as Config
from acktr.config import ConfigError as ConfigError
from acktr.config import CriticConfig as CriticConfig
from acktr.config import NetworkConfig as NetworkConfig
from acktr.config import TRPOConfig as TRPOConfig
from acktr.config import preset as preset
from acktr.envs import AtariSettings as AtariSettings
from acktr.envs import EnvError as EnvError
from acktr.envs import EnvFault as EnvFault
from acktr.envs import PixelSettings as PixelSettings
from acktr.export import ExportError as ExportError
from acktr.kfac import KFAC as KFAC
from acktr.kfac import KFACConfig as KFACConfig
from acktr.rollout import gae as gae
from acktr.runs.checkpoint import CheckpointError as CheckpointError
from acktr.train import Episode as Episode
from acktr.train import TrainStats as TrainStats
