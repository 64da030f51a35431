"Losses and log-probabilities against the golden reference values."
import torch
from golden import cases

from halos_nb.losses import bradley_terry_loss, dpo_loss
from halos_nb.models import token_logps

tol = dict(rtol=1e-4, atol=1e-5)


def tensor(x): return torch.tensor(x, dtype=torch.float32)


def clamp(hyper): return (hyper["log_epsilon_P"], hyper["log_epsilon_R"]) if hyper["humanline"] else None


@cases("losses_dpo")
def test_dpo(case):
    inputs = {k: tensor(v).requires_grad_() for k, v in case["inputs"].items()}
    out = dpo_loss(**inputs, beta=case["hyper"]["beta"], clamp=clamp(case["hyper"]))
    want = case["outputs"]
    for name, got in out._asdict().items(): torch.testing.assert_close(got.flatten(), tensor(want[name]).flatten(), **tol)
    torch.testing.assert_close(out.losses.mean(), tensor(want["mean_loss"]), **tol)
    out.losses.mean().backward()
    for name, grad in case["grads"].items(): torch.testing.assert_close(inputs[name].grad, tensor(grad), **tol)


@cases("losses_bradley_terry")
def test_bradley_terry(case):
    inputs = {k: tensor(v).requires_grad_() for k, v in case["inputs"].items()}
    out = bradley_terry_loss(**inputs)
    torch.testing.assert_close(out.losses.mean(), tensor(case["outputs"]["loss"]), **tol)
    torch.testing.assert_close(out.chosen_scores, tensor(case["outputs"]["chosen_rewards"]), **tol)
    torch.testing.assert_close(out.rejected_scores, tensor(case["outputs"]["rejected_rewards"]), **tol)
    out.losses.mean().backward()
    for name, grad in case["grads"].items(): torch.testing.assert_close(inputs[name].grad, tensor(grad), **tol)


@cases("batch_logps")
def test_token_logps(case):
    dtype = getattr(torch, case["logits_dtype"])
    logits = torch.tensor(case["inputs"]["logits"], dtype=dtype).requires_grad_()
    got = token_logps(logits, torch.tensor(case["inputs"]["labels"]))
    torch.testing.assert_close(got, tensor(case["outputs"]["token_logps"]), **tol)
    got.sum().backward()
    loose = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else tol # the gradient itself is stored in bfloat16
    torch.testing.assert_close(logits.grad.float(), tensor(case["grads"]["logits_of_sum"]), **loose)
