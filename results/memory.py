"""
Peak memory of a training step, without the card: the step runs on tensors that have a shape and no content.

    python results/memory.py --regime meanpool                          # flags of train.py; the full-size model
    python results/memory.py --batch_size 1 --weights bf16 --low_memory

All that torch allocates is counted as long as it lives: weights, gradients, optimiser, activations, bf16 copies. On top come what a
kernel takes for itself, and the CUDA context (about half a GiB). With torch.compile the amounts differ, and they are not known here.
"""
import sys
import weakref
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1]))
from encoders import settings_of                              # noqa: E402
import train                                                  # noqa: E402
from load_deepseek import load                                # noqa: E402

class Storages(TorchDispatchMode):
    """Bytes of the storages that are alive, `now` and at the `peak`."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.known:
            self.known.add(storage)
            self.grow(storage.nbytes())
            weakref.finalize(storage, self.grow, -storage.nbytes())

    def grow(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            return 1.0                                        # Adafactor asks for norms; any will do
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

def hollow(model):
    """Give a model on `meta` parameters on the CPU without content; under FakeTensorMode."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, torch.nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))

def hollow_batch(size, context, continuation, side):
    """A batch without content; under FakeTensorMode."""
    return {'context': torch.empty(size, context, dtype=torch.long), 'continuation': torch.empty(size, continuation, dtype=torch.long),
            'image': torch.empty(size, 3, side, side, dtype=torch.uint8)}

def step_as_on_cuda(model, optimizer, batch, micro_batches, dtype=torch.bfloat16):
    """train.py's step on the CPU with autocast to `dtype`, as on CUDA (None is none); each micro-batch is the same batch."""
    autocast = lambda device: torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
    with patch.object(train, 'autocast', autocast):
        train.train_step(model, optimizer, [batch] * micro_batches, 1.0, 1.0, torch.device('cpu'))

def estimate(model, optimizer, batch, micro_batches=2, dtype=torch.bfloat16):
    """Bytes at the peak of the second step (the first makes the optimiser's state); under FakeTensorMode."""
    storages = Storages()
    for tensor in [*model.parameters(), *batch.values()]:
        storages.add(tensor)
    with storages:
        for _ in range(2):
            step_as_on_cuda(model, optimizer, batch, micro_batches, dtype)
    return storages.peak

def main():
    args = train.parse_args(['--model', 'full', *sys.argv[1:]])
    settings = {name: x for name, x in vars(args).items() if name not in settings_of(train.Flags)}
    model, _, _ = load(args.model, args.regime, args.context, args.objective, args.hybrid_text_tokens, 'meta',
                       torch.bfloat16 if args.weights == 'bf16' else torch.float32, **settings)
    model.decoder.grad_checkpoint = args.low_memory
    if not args.train_encoder:
        model.encoder.requires_grad_(False)
    with FakeTensorMode():
        hollow(model)
        batch = hollow_batch(args.batch_size, args.context, args.continuation, getattr(model.encoder, 'image_size', 0))
        optimizer = train.make_optimizer(model, args.learning_rate, args)
        peak = estimate(model, optimizer, batch, min(args.gradient_accumulation_steps, 2))
    print(f'{peak / 1e9:.1f} GB  {" ".join(sys.argv[1:])}')

if __name__ == '__main__':
    main()
