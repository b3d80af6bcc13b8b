"""Shards model, gradients and optimizer over all ranks with FSDP2; hyper-connections compute in fp32.

torchrun --nproc_per_node 2 examples/fsdp2.py [--model ID] [--text FILE] [--output FOLDER]

Runs on GPUs over NCCL, and on CPUs over gloo. With accelerate or the Trainer instead of the loop below, call
`shard_hyper_connections` before they wrap the model; docs/training.md has the launch files.
"""

import torch
import torch.distributed as dist
from scaffold import Windows, load_model, parse_arguments, report
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from kromhc_hf import apply_hyper_connections, optimizer_param_groups, shard_hyper_connections


def mean_over_ranks(loss: torch.Tensor) -> float:
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


@torch.no_grad()
def evaluate(model, loader, device) -> float:
    losses = [model(**{k: v.to(device) for k, v in batch.items()}).loss for batch in loader]
    return mean_over_ranks(torch.stack(losses).mean())


def main() -> None:
    options = parse_arguments(__doc__ or "", "text", "length", steps=60, learning_rate=1e-4)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    dist.init_process_group(torch.distributed.get_default_backend_for_device(accelerator or "cpu"))
    rank, device = dist.get_rank(), torch.device("cpu")
    if accelerator is not None:
        device = torch.device(accelerator.type, rank % torch.accelerator.device_count())
        torch.accelerator.set_device_index(device.index)
    model, tokenizer = load_model(options.model)
    apply_hyper_connections(model, num_streams=options.num_streams).to(device)

    # bf16 in the backbone where it is fast; hyper-connections first, since an existing unit keeps its policy.
    shard_hyper_connections(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if accelerator else None
    for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
        fully_shard(module, mp_policy=policy or MixedPrecisionPolicy())
    fully_shard(model, mp_policy=policy or MixedPrecisionPolicy())
    optimizer = torch.optim.AdamW(optimizer_param_groups(model, lr=options.learning_rate, weight_decay=0.1))

    def loader(held_out: bool) -> DataLoader:
        windows = Windows(tokenizer, options.text, options.length, held_out=held_out)
        sampler = DistributedSampler(windows, shuffle=not held_out, drop_last=True)
        return DataLoader(windows, batch_size=max(1, options.batch // dist.get_world_size()), sampler=sampler)

    before = evaluate(model, loader(held_out=True), device)
    batches = iter(())
    epoch = 0
    progress = tqdm(range(options.steps), disable=rank != 0)
    for _ in progress:
        batch = next(batches, None)
        if batch is None:
            training = loader(held_out=False)
            training.sampler.set_epoch(epoch)
            batches, epoch = iter(training), epoch + 1
            batch = next(batches)
        loss = model(**{k: v.to(device) for k, v in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{mean_over_ranks(loss):.3f}")
    after = evaluate(model, loader(held_out=True), device)

    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(options.output, state_dict=tensors)
        tokenizer.save_pretrained(options.output)
        report(before, after, options.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
