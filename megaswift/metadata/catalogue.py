"""The catalogue of families: model_type of config.json -> declaration."""

from megaswift.metadata.families.cohere import COHERE, COHERE2
from megaswift.metadata.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, KIMI_K2
from megaswift.metadata.families.dots import DOTS1
from megaswift.metadata.families.ernie import ERNIE4_5, ERNIE4_5_MOE
from megaswift.metadata.families.exaone import EXAONE4
from megaswift.metadata.families.gemma import GEMMA, GEMMA2, GEMMA3_TEXT, GEMMA4_TEXT
from megaswift.metadata.families.glm import GLM4, GLM4_MOE, GLM4_MOE_LITE
from megaswift.metadata.families.gpt_oss import GPT_OSS
from megaswift.metadata.families.granite import GRANITE, GRANITEMOE, GRANITEMOESHARED
from megaswift.metadata.families.hunyuan import HUNYUAN_V1_DENSE, HUNYUAN_V1_MOE
from megaswift.metadata.families.llama import APERTUS, ARCEE, INTERNLM3, LLAMA, SEED_OSS, SMOLLM3
from megaswift.metadata.families.llama4 import LLAMA4_TEXT
from megaswift.metadata.families.minimax import MINIMAX_M2
from megaswift.metadata.families.mistral import MINISTRAL3, MISTRAL, MIXTRAL
from megaswift.metadata.families.olmo import OLMO2, OLMO3, OLMOE
from megaswift.metadata.families.phi import PHI3
from megaswift.metadata.families.qwen import MIMO, QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from megaswift.metadata.families.qwen_hybrid import QWEN3_5_MOE_TEXT, QWEN3_5_TEXT, QWEN3_NEXT
from megaswift.metadata.families.starcoder import STARCODER2
from megaswift.metadata.family import Family

FAMILIES: dict[str, Family] = {
    "apertus": APERTUS,
    "arcee": ARCEE,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "dots1": DOTS1,
    "ernie4_5": ERNIE4_5,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "exaone4": EXAONE4,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3_TEXT,
    "gemma4_text": GEMMA4_TEXT,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    "glm4_moe_lite": GLM4_MOE_LITE,
    "gpt_oss": GPT_OSS,
    "granite": GRANITE,
    "granitemoe": GRANITEMOE,
    "granitemoeshared": GRANITEMOESHARED,
    "hunyuan_v1_dense": HUNYUAN_V1_DENSE,
    "hunyuan_v1_moe": HUNYUAN_V1_MOE,
    "internlm3": INTERNLM3,
    "kimi_k2": KIMI_K2,
    "llama": LLAMA,
    "llama4_text": LLAMA4_TEXT,
    "mimo": MIMO,
    "minimax_m2": MINIMAX_M2,
    "ministral3": MINISTRAL3,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "olmoe": OLMOE,
    "phi3": PHI3,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_5_moe_text": QWEN3_5_MOE_TEXT,
    "qwen3_5_text": QWEN3_5_TEXT,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_next": QWEN3_NEXT,
    "seed_oss": SEED_OSS,
    "smollm3": SMOLLM3,
    "starcoder2": STARCODER2,
}
