"""sentence-transformers' `encode`, as its documentation shows it: it sorts by length itself, 32 texts a batch.

Settings: precision; backend `torch` or `openvino`.
"""

import os


def load(model, settings):
    import torch
    from sentence_transformers import SentenceTransformer

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    half = settings["precision"] == "bf16"
    if settings.get("backend") == "openvino":
        hints = {"INFERENCE_PRECISION_HINT": "bf16" if half else "f32", "INFERENCE_NUM_THREADS": threads}
        options = {"backend": "openvino", "model_kwargs": {"export": True, "ov_config": hints}}
    else:
        options = {"model_kwargs": {"dtype": torch.bfloat16 if half else torch.float32}}
    return System(SentenceTransformer(model, device=settings.get("device", "cpu"), local_files_only=True, **options))


class System:
    def __init__(self, model):
        self.model = model

    def embed(self, texts):
        return self.model.encode(texts, show_progress_bar=False, normalize_embeddings=True)
