"""SGLang asks for CUDA libraries and was not run; what its source says."""

from clients.client import Client


CLIENT = Client(
    tool="SGLang",
    requirements=("sglang==0.5.23",),
    use="`--trust-remote-code --model-impl transformers --dtype float32`. Its Transformers backend makes every "
    "parameter in the dtype of the model and keeps none in fp32 (`srt/models/transformers.py`, `_init_parameters`): in "
    "bfloat16 the mappings lose what fp32 gives them.",
    source="0.5.23. The class: an attribute of `transformers`, else the code beside the model, which "
    "`resolve_transformers_arch` loads. Norms are replaced by some that take [.., C] of any rank, linear layers by the "
    "plan of the family; hyper-connections are parameters in neither and stay whole on every rank. Attention is given "
    "by layer number, as for the base. Parameters lose fp32 unless `--dtype float32` is given. Pipeline stages leave "
    "empty layers behind, which a model with hyper-connections refuses.",
)
