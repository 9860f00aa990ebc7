"""The decision as a random variable and what is learned from its reward (sections 3.2 and 3.3 of the paper).

s (B, K): keep probabilities of the policy network; u (B, K): a policy, True where a block is kept; R (B,): rewards.
Official files: cl_training.py and finetune.py. All functions are pure: randomness comes in as uniform numbers.
"""

from torch import Tensor


def bounded(s: Tensor, alpha: float = 0.8) -> Tensor:
    """s' = alpha s + (1 - alpha)(1 - s), in [1 - alpha, alpha]: no decision becomes certain. (B, K) -> (B, K).

    alpha in (0.5, 1]; above 0.5 it keeps the side of 1/2 that s is on, so both have the same greedy policy.
    """
    if not 0.5 < alpha <= 1:
        raise ValueError(f"alpha={alpha}, expected 0.5 < alpha <= 1")
    return alpha * s + (1 - alpha) * (1 - s)


def greedy(s: Tensor) -> Tensor:
    """u~ = 1[s >= 1/2], the policy of the baseline and of the test. (B, K) -> bool (B, K)."""
    return s >= 0.5


def sample(s: Tensor, uniform: Tensor) -> Tensor:
    """u ~ prod_k Bernoulli(s_k), from uniform (B, K) in [0, 1). -> bool (B, K)."""
    return uniform < s


def forced(u: Tensor, decided: int) -> Tensor:
    """The curriculum: of K blocks only the last `decided` are decided, those before are kept. (B, K) -> bool (B, K)."""
    kept = u.clone()
    kept[:, : u.shape[1] - decided] = True
    return kept


def log_prob(s: Tensor, u: Tensor) -> Tensor:
    """log(s_k u_k + (1 - s_k)(1 - u_k)) of each block: (B, K), (B, K) -> (B, K)."""
    return s.where(u, 1 - s).log()


def rewards(u: Tensor, correct: Tensor, gamma: float) -> Tensor:
    """R(u) = 1 - (|u| / K)^2 where the prediction under u is right, -gamma where it is wrong. (B, K), (B,) -> (B,)."""
    share = u.float().mean(-1)
    return (1 - share**2).where(correct, -gamma)


def entropy_term(s: Tensor) -> Tensor:
    """-s log s of each block, one side of the entropy, as in the official code. (B, K) -> (B, K).

    Largest at s = 1/e, not 1/2: beside exploration it pulls keep probabilities down a little.
    """
    return -s * s.log()


def curriculum_loss(s: Tensor, u: Tensor, advantage: Tensor, decided: int, alpha: float, beta: float) -> Tensor:
    """Loss of a curriculum step, a mean over the batch of sums over blocks. Scalar.

    -(log pi(u_k)) A summed over the decided blocks, minus beta times the entropy term of *all* blocks: the official code
    masks the first sum alone, so early blocks are held near s' = 1/e until their turn comes.
    """
    s = bounded(s, alpha)
    chosen = log_prob(s, u)[:, s.shape[1] - decided :].sum(1)
    return (-chosen * advantage - beta * entropy_term(s).sum(1)).mean()


def policy_loss(s: Tensor, u: Tensor, advantage: Tensor, alpha: float) -> Tensor:
    """Policy part of a fine-tuning step, a SUM over the batch: sum_b -log pi(u_b) A_b. Scalar.

    Beside it stands a MEAN cross-entropy. The two share no weight (u is data for the ResNet, the policy network is not in
    the cross-entropy), and Adam takes a factor out of a gradient: their ratio, and so the batch size, does not matter.
    """
    return -(log_prob(bounded(s, alpha), u).sum(1) * advantage).sum()
