"""A QwenImagePipeline in miniature with random weights: 64x64 images, two double-stream blocks, Qwen2.5-VL."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.tiny import PROMPTS

TEXT_WIDTH = 32
# of 4 tokens, and of 70: conditions of 64 and of 128
SHORT, LONG = PROMPTS[0], " ".join(["two blue squares and a green triangle"] * 10)
_SYSTEM = (
    "system Describe the image by detailing the color , shape , size , texture , quantity , text , spatial "
    "relationships of the objects and background : user assistant Comprehend analyze provided prompt ."
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as published
SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "use_dynamic_shifting": True,
}


def make_pipeline(directory: Path, seed: int = 0) -> Path:
    """Write the pipeline's directory in float32; returns it."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 2 * TEXT_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": TEXT_WIDTH,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
        },
    )
    pipeline = QwenImagePipeline(
        transformer=make_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=make_autoencoder(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
    )
    pipeline.save_pretrained(directory)
    return Path(directory)


def make_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )


def make_autoencoder() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that cuts text as Qwen's does, between words, and knows those of the prompts."""
    texts = " ".join([*PROMPTS, LONG, _SYSTEM]).split()
    words = ["<unk>", "<|endoftext|>", "\n", *SPECIAL, *sorted({*texts})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex(r"\n|[,:.]"), "isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        chat_template=CHAT_TEMPLATE,
    )
