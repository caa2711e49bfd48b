"""What torch.compile makes of a training step, as far as it shows without a GPU: the graphs from which it would generate code,
kept, and run as they are on the CPU under bf16 autocast."""
import inspect
from functools import partial

import pytest
import torch
import train
from conftest import golden_config, golden_image
from decoder import Autoencoder, Decoder
from encoders import ENCODERS
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

B, T, V, E = 2, 24, 512, 8                                    # segments, tokens in each, vocabulary, experts
PRODUCTS = ('mm', 'addmm', 'bmm', 'baddbmm', '_grouped_mm', 'convolution', 'convolution_backward')
WAITS = {'_local_scalar_dense', 'nonzero', 'masked_select'}
ATOMIC = {'index_add', 'scatter_add', 'scatter_reduce'}

def bf16(device):
    """As on CUDA."""
    return torch.autocast('cpu', torch.bfloat16)

def calls_of_two_steps(model, monkeypatch):
    """Train for two steps of two micro-batches, with an evaluation before each -> what the forward graph and the backward graph
    call: (operator, tensors that go in, what comes out)."""
    graphs = []

    def keep(graph, inputs):
        nodes = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        graphs.append([(node.target.overloadpacket.__name__, [n.meta['val'] for n in node.all_input_nodes], node.meta['val'])
                       for node in nodes])
        return make_boxed_func(graph.forward)

    ids = torch.randint(3, V, (2, B, T), generator=torch.Generator().manual_seed(0))
    batch = {'context': ids[0], 'continuation': ids[1], 'image': torch.stack([golden_image(128, k) for k in range(B)])}
    optimizer = train.make_optimizer(model, 1e-3, train.parse_args(['--model', 'full', '--learning_rate', '1e-3']))
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    monkeypatch.setattr(train, 'autocast', bf16)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch._functorch.config.patch(backward_pass_autocast='same_as_forward'):
        # train.py compiles on CUDA alone; this is the option that it sets there.
        option, = (line for line in inspect.getsource(train.main).splitlines() if line.strip().startswith('torch._functorch.config'))
        exec(option.strip())
        forward = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
        for _ in range(2):
            model.eval()
            with torch.no_grad(), bf16('cpu'):
                loss = model(batch)[0].mean()
            report = train.train_step(forward, optimizer, [batch] * 2, 1.0, 1.0, torch.device('cpu'))
            assert abs(report['loss'] - loss) < 1e-2 and 0 < report['grad_norm'] < 1e3
    assert len(graphs) == 2, 'recompiled'
    return graphs

@pytest.mark.parametrize('regime, recompute', (('meanpool', False), ('meanpool', True), ('vision', False)))
def test_a_compiled_step(monkeypatch, regime, recompute):
    """One graph each way, in which the host waits for nothing, every product is in bf16 but the router's, and nothing that is
    large is made twice. recompute: activations too are computed again in the backward pass."""
    config = golden_config()
    config.num_hidden_layers = 2                              # one dense layer, one of experts
    config.vision.sam_layers, config.vision.clip_layers = 2, 1
    torch.manual_seed(0)
    settings = {'vision_mode': '128'} if regime == 'vision' else {}
    model = Autoencoder(ENCODERS[regime](config, T, **settings), Decoder(config))
    model.decoder.grad_checkpoint = recompute
    model.decoder.token_losses = partial(model.decoder.token_losses, rows=8)        # six chunks where it is not compiled
    graphs = calls_of_two_steps(model, monkeypatch)

    found = []
    for calls in graphs:
        fp32 = logits = 0
        for name, tensors, result in calls:
            assert name not in WAITS and name not in ATOMIC
            assert 'index_put' not in name or regime == 'vision'        # SAM's tables of positions, which are small
            assert not name.startswith('_scaled_dot_product') or tensors[0].dtype == torch.bfloat16
            assert 'index' not in name or all(t.dtype != torch.bool for t in tensors), 'a boolean index'
            if name in PRODUCTS:
                logits += isinstance(result, torch.Tensor) and result.shape[-1] == V
                if any(t.dtype == torch.float32 for t in tensors):
                    assert any(E in t.shape for t in tensors) and name == 'mm', 'in fp32, though it is not the router'
                    fp32 += 1
        names = [name for name, *_ in calls]
        found.append((fp32, logits, names.count('_grouped_mm'), names.count('embedding_dense_backward')))
    # Recomputing repeats the router's product and the experts' two. Mean pooling looks up the context by itself.
    assert found[0] == (1, 1, 2, 0)
    assert found[1] == (2 + recompute, 1, 4 + 2 * recompute, 1 + (regime == 'meanpool'))
