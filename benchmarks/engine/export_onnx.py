"""`python export_onnx.py MODEL FOLDER`, in a peer's environment: the encoder as ONNX, beside its tokenizer.

The peer's own exporter asks for PyTorch's new exporter where the PyTorch is new, and fails there.
"""

import sys
from pathlib import Path


def main():
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, folder = sys.argv[1], Path(sys.argv[2])
    encoder = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sample = tokenizer(["a text", "a somewhat longer text"], return_tensors="pt", padding=True)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {name: {0: "batch", 1: "length"} for name in [*names, "last_hidden_state"]}
    arguments = tuple(sample[name] for name in names)
    partial = folder / "model.partial"
    torch.onnx.export(
        encoder, arguments, partial, input_names=names, output_names=["last_hidden_state"], dynamic_axes=axes,
        opset_version=17, dynamo=False,
    )  # fmt: skip
    partial.rename(folder / "model.onnx")


if __name__ == "__main__":
    main()
