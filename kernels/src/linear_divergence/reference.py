"""The divergence of two distributions over tokens, in plain torch.

Letters: T tokens, V vocabulary.
"""

import math

import torch


def generalised_jsd(student_TV: torch.Tensor, teacher_TV: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return every token's generalised Jensen-Shannon divergence [T] from logits of a whole vocabulary.

    With q of the student, p of the teacher and m = beta p + (1 - beta) q it is beta KL(p || m) + (1 - beta) KL(q || m):
    Agarwal et al. 2023 (arXiv 2306.13649), eq. 1. Beta 0 stands for KL(p || q) and 1 for KL(q || p), its limits over beta and
    over 1 - beta, as in TRL 1.16.
    """
    log_q_TV, log_p_TV = student_TV.log_softmax(1), teacher_TV.log_softmax(1)
    if beta == 0:
        return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(1)
    if beta == 1:
        return (log_q_TV.exp() * (log_q_TV - log_p_TV)).sum(1)
    log_m_TV = torch.logaddexp(log_p_TV + math.log(beta), log_q_TV + math.log1p(-beta))
    to_teacher_T = (log_p_TV.exp() * (log_p_TV - log_m_TV)).sum(1)
    return beta * to_teacher_T + (1 - beta) * (log_q_TV.exp() * (log_q_TV - log_m_TV)).sum(1)
