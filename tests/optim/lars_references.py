"""The optimizers' formulas in float64 NumPy, each written out on its own from its source, one variable at a time.

Every reference is a function (w, v, g, lr, last_lr, **settings) -> (w, v).
"""

import numpy as np


def norm(x):
    return np.sqrt(np.sum(np.square(x)))


def caffe(w, v, g, lr, last_lr, m, wd, eta):
    """Intel Caffe: local rate from the raw gradient's norm, then one fused update of history and weight."""
    local = eta * norm(w) / (norm(g) + wd * norm(w)) if norm(w) > 0 and norm(g) > 0 else 1.0
    v = lr * local * (wd * w + g) + m * v
    return w - v, v


def mlperf(w, v, g, lr, last_lr, m, wd, eta, eps, nesterov=False):
    """The MLPerf TensorFlow 2 reference: vectors and scalars (batch norm, bias) are skipped."""
    if w.ndim > 1:
        trust = eta * norm(w) / (norm(g) + wd * norm(w) + eps) if norm(w) > 0 and norm(g) > 0 else 1.0
        lr = lr * trust
        g = g + wd * w
    v = m * v - lr * g
    return (w + m * v - lr * g if nesterov else w + v), v


def tf_models(w, v, g, lr, last_lr, m, wd, eta, nesterov=False):
    """tensorflow/models with classic momentum: decay first, then the norm of the sum."""
    g = g + wd * w
    trust = eta * norm(w) / norm(g) if norm(w) > 0 and norm(g) > 0 else 1.0
    v = m * v + lr * trust * g
    return (w - (m * v + lr * trust * g) if nesterov else w - v), v


def optax(w, v, g, lr, last_lr, m, wd, eta, eps=0.0):
    """optax.lars: add_decayed_weights, scale_by_trust_ratio, scale by -lr, trace."""
    update = g + wd * w
    ratio = eta * norm(w) / (norm(update) + eps) if norm(w) != 0 and norm(update) != 0 else 1.0
    v = -lr * ratio * update + m * v
    return w + v, v


def outside(w, v, g, lr, last_lr, m, wd, eta, nesterov=False):
    """The rate outside the buffer; ranks 0 and 1 left out."""
    if w.ndim > 1:
        local = eta * norm(w) / (norm(g) + wd * norm(w)) if norm(w) > 0 and norm(g) > 0 else 1.0
        g = local * (g + wd * w)
    v = m * v + g
    return (w - lr * (m * v + g) if nesterov else w - lr * v), v


def larc(w, v, g, lr, last_lr, m, wd, eta):
    """LARC, clipping: the gradient is scaled by min(local / lr, 1) before plain momentum with the rate inside."""
    if w.ndim > 1:
        local = eta * norm(w) / (norm(g) + wd * norm(w)) if norm(w) > 0 and norm(g) > 0 else np.inf
        g = (g + wd * w) * (min(local / lr, 1.0) if lr > 0 else 1.0)
    v = m * v + lr * g
    return w - v, v


def ratio_only(w, v, g, lr, last_lr, m, wd, eta):
    """Decay counts in the local rate and nowhere else."""
    if w.ndim > 1 and norm(w) > 0 and norm(g) > 0:
        lr = lr * eta * norm(w) / (norm(g) + wd * norm(w))
    v = m * v + lr * g
    return w - v, v


def tf_contrib(w, v, g, lr, last_lr, m, wd, eta, eps=0.0, nesterov=False):
    """tf.contrib.opt: TensorFlow 1's ApplyMomentum with the scaled rate, which stays outside its accumulator."""
    if norm(w) > 0 and norm(g) > 0:
        lr = lr * eta * norm(w) / (norm(g) + wd * norm(w) + eps)
    v = m * v + g
    return (w - lr * g - lr * m * v if nesterov else w - lr * v), v


def tf_models_popular(w, v, g, lr, last_lr, m, wd, eta, nesterov=False):
    """tensorflow/models with classic_momentum=False: the ratio of weight to update."""
    g = g + wd * w
    v = m * v + g
    update = m * v + g if nesterov else v
    trust = eta * norm(w) / norm(update) if norm(w) > 0 and norm(update) > 0 else 1.0
    return w - trust * lr * update, v


def corrected(w, v, g, lr, last_lr, m, wd, eta):
    """Goyal et al., equation 10, on LARS: the buffer follows the rate."""
    if w.ndim > 1:
        local = eta * norm(w) / (norm(g) + wd * norm(w)) if norm(w) > 0 and norm(g) > 0 else 1.0
        g = local * (g + wd * w)
    v = m * (lr / last_lr) * v + lr * g
    return w - v, v


def sgd_inside(w, v, g, lr, last_lr, m, wd, nesterov=False):
    g = g + wd * w if w.ndim > 1 else g
    v = m * v + lr * g
    return (w - (m * v + lr * g) if nesterov else w - v), v


def sgd_outside(w, v, g, lr, last_lr, m, wd):
    g = g + wd * w if w.ndim > 1 else g
    v = m * v + g
    return w - lr * v, v
