"""KV-cache bytes and prefill time of pruned vision-language models at real layer widths.

    python benchmarks/pruned_prefill.py --layers 2 --device cuda --dtype bfloat16

Weights are random and the layers few: a cache grows with the layers, so its share is that of the whole model. Prefill
runs from image features on. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import transformers as t

import fastxattn

IMAGE, TEXT = 98, 60
MODELS = ("llava-1.5-7b", "qwen2.5-vl-7b")


def llava(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """LLaVA-1.5-7B: Llama layers of width 4096, one image of 24 x 24 tokens, a small vision encoder."""
    vision = t.CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=336, patch_size=14
    )
    text = t.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, vocab_size=128
    )
    model = t.LlavaForConditionalGeneration(t.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    ids = torch.tensor([[1, *[IMAGE] * 576, *[5] * TEXT]])
    return model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336)}


def qwen(layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """Qwen2.5-VL-7B: grouped layers of width 3584, one image of 36 x 36 tokens, a small vision encoder."""
    vision = {"depth": 1, "hidden_size": 64, "out_hidden_size": 3584, "num_heads": 4, "intermediate_size": 64}
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": layers, "num_attention_heads": 28}
    text |= {"num_key_value_heads": 4, "vocab_size": 128, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}
    names = {"image_token_id": IMAGE, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **names)
    ids = torch.tensor([[1, 96, *[IMAGE] * 1296, 95, *[5] * TEXT]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": torch.tensor([[1, 72, 72]]),
    }
    return t.Qwen2_5_VLForConditionalGeneration(config), inputs | {
        "pixel_values": torch.randn(72 * 72, 3 * 2 * 14 * 14)
    }


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values."""
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


@torch.no_grad()
def measure(model: Any, inputs: dict[str, Any], repeats: int) -> tuple[int, float]:
    """Cache bytes, and the median milliseconds of the runs after the first."""
    times, size = [], 0
    features = model.get_image_features(**{k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")})
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    for _ in range(repeats + 1):
        synchronize(inputs)
        start = time.perf_counter()
        out = model(**rest, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1)
        synchronize(inputs)
        times.append(1e3 * (time.perf_counter() - start))
        size = cache_bytes(out.past_key_values)
    return size, statistics.median(times[1:])


def synchronize(inputs: dict[str, Any]) -> None:
    """Wait for the device."""
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="*", default=list(MODELS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    print("model,layers,dtype,device,prune,cache_bytes,cache_share,prefill_ms,prefill_share")
    for name in given.model:
        torch.manual_seed(0)
        with torch.device("cpu"):
            model, inputs = (llava if name == MODELS[0] else qwen)(given.layers)
        model = model.eval().to(given.device, dtype)
        inputs = {
            k: v.to(given.device, dtype) if v.is_floating_point() else v.to(given.device) for k, v in inputs.items()
        }
        full = measure(model, inputs, given.repeats)
        rows = {"none": full}
        for keep in (0.5, 0.25):
            for at in (0, 2):
                if at < given.layers:
                    with fastxattn.prune_model(model, keep=keep, strategy="attention" if at else "divprune", at=at):
                        rows[f"keep={keep} at={at}"] = measure(model, inputs, given.repeats)
        for label, (size, ms) in rows.items():
            print(
                f"{name},{given.layers},{given.dtype},{given.device},{label},{size},{size / full[0]:.3f},"
                f"{ms:.2f},{ms / full[1]:.3f}"
            )


if __name__ == "__main__":
    main()
