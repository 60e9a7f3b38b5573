"""The public names, and the module that each is imported from when it is asked for: `fluxnb.__init__` reads this."""

from fluxnb.cache.engine import Cache as Cache
from fluxnb.cache.engine import first_block as first_block
from fluxnb.cache.gates.first_block import FirstBlock as FirstBlock
from fluxnb.cache.gates.interval import Interval as Interval
from fluxnb.cache.gates.magcache import MagCache as MagCache
from fluxnb.cache.gates.pairs import Both as Both
from fluxnb.cache.gates.pairs import Cascade as Cascade
from fluxnb.cache.gates.pairs import Either as Either
from fluxnb.cache.gates.schedule import Schedule as Schedule
from fluxnb.cache.gates.teacache import TeaCache as TeaCache
from fluxnb.cache.predictors import Hold as Hold
from fluxnb.cache.predictors import Taylor as Taylor
from fluxnb.errors import UserError as UserError
from fluxnb.recipes import accelerate as accelerate
from fluxnb.recipes import plan as plan
from fluxnb.stacks import Stack as Stack
from fluxnb.technique import Technique as Technique
from fluxnb.technique import Unavailable as Unavailable
from fluxnb.technique import applied as applied
from fluxnb.techniques.attention import Attention as Attention
from fluxnb.techniques.compilation import CudaGraph as CudaGraph
from fluxnb.techniques.compilation import FusedQKV as FusedQKV
from fluxnb.techniques.compilation import Regional as Regional
from fluxnb.techniques.compilation import TensorRT as TensorRT
from fluxnb.techniques.compilation import TextEncoders as TextEncoders
from fluxnb.techniques.compilation import Whole as Whole
from fluxnb.techniques.fused import FusedGELU as FusedGELU
from fluxnb.techniques.fused import FusedRoPE as FusedRoPE
from fluxnb.techniques.hook_search import NoHookSearch as NoHookSearch
from fluxnb.techniques.modulation import ModulationAhead as ModulationAhead
from fluxnb.techniques.precision import GGUF as GGUF
from fluxnb.techniques.precision import BitsAndBytes as BitsAndBytes
from fluxnb.techniques.precision import Nunchaku as Nunchaku
from fluxnb.techniques.precision import Quanto as Quanto
from fluxnb.techniques.precision import TorchAO as TorchAO
from fluxnb.techniques.schedulers import DPMSolver as DPMSolver
from fluxnb.techniques.sparsity import SparseInt8 as SparseInt8
from fluxnb.techniques.svdquant import SimulatedSVDQuant as SimulatedSVDQuant
from fluxnb.techniques.vae import BytesOnDevice as BytesOnDevice
from fluxnb.techniques.vae import ChannelsLast as ChannelsLast
from fluxnb.techniques.vae import Compiled as Compiled
from fluxnb.techniques.vae import Sliced as Sliced
from fluxnb.techniques.vae import Tiled as Tiled

__version__: str
