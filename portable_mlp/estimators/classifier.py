"""The classifier: encodes labels as class numbers and decodes predictions to labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import type_of_target

from portable_mlp.architectures import BuildNetwork
from portable_mlp.backends import NumPyBackend, to_host
from portable_mlp.callbacks import Callback
from portable_mlp.estimators.construction import LossFunction, chosen_loss
from portable_mlp.estimators.fitting import MultilayerPerceptron, without_partial_fit
from portable_mlp.estimators.sklearn_compat import (
    only_if,
)
from portable_mlp.functions import log_softmax, sigmoid, softplus
from portable_mlp.groups import Treatment
from portable_mlp.layers import Layer
from portable_mlp.losses import (
    BinaryCrossEntropy,
    Loss,
    SoftmaxCrossEntropy,
)
from portable_mlp.optimizers import Optimizer
from portable_mlp.schedules import Schedule, Scheduled
from portable_mlp.typing import Array


class MLPClassifier(ClassifierMixin, MultilayerPerceptron):
    """Multilayer perceptron for binary, multiclass and multilabel classification.

    It minimises the cross-entropy of its logits, unless another ``loss`` is given.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int, default=(100,)
        Number of units of each hidden layer.
    activation : str, Layer, or a sequence of one for each hidden layer, default="relu"
        A name in `portable_mlp.activations.ACTIVATIONS`, or a layer.
    solver : str or Optimizer, default="adam"
        "lbfgs", or a name in `portable_mlp.optimizers.SOLVERS`, of which "adam" and "sgd"
        follow scikit-learn's conventions.  An instance brings its own settings.
    alpha : float >= 0, default=1e-4
        L2 penalty on the weights, divided by the number of rows of a batch.
    batch_size : int or "auto", default="auto"
        Number of rows in a batch; "auto" is min(200, n_samples).
    learning_rate : str or Schedule, default="constant"
        A name in `portable_mlp.schedules.SCHEDULES`, or an instance, which brings its own
        settings.  Every solver but "lbfgs" follows it.  The names "invscaling" and "adaptive"
        only affect solver="sgd"; instances affect the other solvers too.
    learning_rate_init : float > 0, default=0.001
        Initial learning rate; the schedule scales it.
    power_t : float >= 0, default=0.5
        Exponent of "invscaling".
    max_iter : int >= 1, default=200
        Largest number of epochs, or of iterations of "lbfgs".
    shuffle : bool, default=True
        Whether to reshuffle the rows before each epoch.
    random_state : int, RandomState or None, default=None
        Seed or random generator for the initial weights, the held-out rows, the order of
        the rows, and dropout.
    tol : float >= 0, default=1e-4
        Smallest improvement that counts as one.
    verbose : bool, default=False
        Whether to show progress: a bar on a terminal, one line per epoch elsewhere.
    warm_start : bool, default=False
        Whether ``fit`` starts from the fitted weights.
    momentum : float in [0, 1], default=0.9
        Momentum of "sgd".
    nesterovs_momentum : bool, default=True
        Whether "sgd" uses Nesterov's momentum.
    early_stopping : bool, default=False
        Whether to monitor the score of held-out rows instead of the loss, and to keep the
        best weights.
    validation_fraction : float in [0, 1), default=0.1
        Fraction of the rows that early stopping holds out.
    beta_1, beta_2, epsilon : float, default=0.9, 0.999, 1e-8
        Hyperparameters of "adam" and "adamw"; "rmsprop" uses epsilon too.
    n_iter_no_change : int or inf, default=10
        Number of epochs without improvement that training tolerates.
    max_fun : int, default=15000
        Largest number of loss evaluations of "lbfgs".
    device : {"cpu", "gpu", "auto"}, optional
        Where to compute.  Without ``backend``, "cpu" is NumPy and "gpu" is CuPy.  For host
        data, "auto" is CuPy if there is a usable GPU, and NumPy otherwise.
    backend : {"numpy", "cupy", "torch", "jax"}, optional
        The array library to compute with.  Without ``device`` and ``backend``, computation
        follows X.
    dtype : {"float32", "float64"}, optional
        Dtype of the computation.  By default it is float32 for X of that dtype, and float64
        for any other X.
    dropout : float in [0, 1), or schedules.Scheduled, default=0
        Dropout rate after each hidden activation.
    clip_norm : float > 0, optional
        Largest global norm of a step's gradients.
    weight_decay : float >= 0, or schedules.Scheduled, optional
        Weight decay, decoupled from the gradient (Loshchilov and Hutter, 2019): each step
        subtracts learning rate × weight_decay × the parameters.  For every solver but
        "lbfgs".  The default is 0.01 for "adamw" and 0 for the others.
    scoring : str or callable, optional
        A scikit-learn scorer.  Early stopping monitors it, and ``validation_scores_`` holds
        its values.  The default is the metric of ``score``.
    callbacks : sequence of portable_mlp.Callback, optional
        Callbacks, called in every epoch; they can stop the fit.
    treatments : dict, optional
        Map from groups of parameters ("weight", "bias", labels of custom layers) to
        `portable_mlp.groups.Treatment`: factors on learning rate, weight decay and
        penalty, and a schedule of their own.  An entry replaces the group's default, which
        for "bias" is ``Treatment(penalty=0.0)``.  For every solver but "lbfgs".
    architecture : callable, optional
        Function ``architecture(n_features, n_outputs)`` that returns the `portable_mlp.Network`
        to train; see `portable_mlp.architectures`.  It replaces hidden_layer_sizes,
        activation and dropout.
    label_smoothing : float in [0, 1), default=0
        Fraction of each target that is spread evenly over the classes.
    loss : Loss or callable, optional
        Loss to minimise.  The default is the cross-entropy with ``clipped=True``, which has
        the values that scikit-learn reports.  A callable takes logits (n, k), targets and
        the namespace.  It returns the rows' losses (n,) and their derivatives with respect
        to the logits (n, k); `portable_mlp.check_loss` verifies it.  Targets are class
        numbers (n,); 0.0 and 1.0, (n,), for two classes; or 0.0 and 1.0, (n, k), for
        several labels.
    class_weight : dict or "balanced", optional
        Factors on the rows' weights by class; "balanced" gives each class the same
        total weight.

    Attributes
    ----------
    classes_ : ndarray (n_classes,)
        The sorted labels.
    network_ : Network
        The layers.
    params_ : list of arrays
        The network's parameters, in the order of ``network_.params``.  They are in the
        namespace and on the device of the fitted X.
    coefs_, intercepts_ : lists of arrays (n_in, n_out) and (n_out,)
        The weights and biases of the linear layers.  Setting an item also sets it in
        ``params_``.
    loss_, best_loss_ : float
        The last training loss, and the lowest; ``best_loss_`` is None with early stopping.
    loss_curve_ : list of float
        The training loss of each epoch.
    validation_loss_curve_, validation_scores_ : list of float
        Loss and score of the held-out rows, or of X_val, after each epoch; None without
        such rows.
    best_validation_score_ : float
        The highest validation score; None without early stopping.
    layer_params_ : list of arrays
        The parameters of all other layers.
    n_iter_, t_, n_layers_, n_outputs_, n_features_in_ : int
        The number of epochs, of rows seen in training, of layers (the input included), of
        outputs, and of columns of X.
    stop_reason_ : {"converged", "max_epochs", "stopped", "interrupted", "diverged", "failed"}
        Why training ended.  "max_epochs": at the limit of this call (``max_iter``,
        ``n_iter``, ``max_fun``, an epoch of ``partial_fit``).  "stopped": by a callback.
        "interrupted": by Ctrl-C.  "diverged": only with early stopping; otherwise divergence
        is an error.  "failed": L-BFGS found no better point.  It is None after
        ``init_model``, and missing from a loaded model.
    feature_names_in_ : ndarray of str
        Names of the columns of X, if it has any.
    out_activation_ : str
        Name of the function from logits to predictions.

    Examples
    --------
    >>> from portable_mlp import MLPClassifier
    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> model = MLPClassifier(solver="lbfgs", alpha=1.0, max_iter=1000, random_state=0)
    >>> model = model.fit(X, y)
    >>> model.score(X, y) > 0.95
    True
    """

    _metric = staticmethod(accuracy_score)
    _learns_classes = True
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **MultilayerPerceptron._parameter_constraints,
        "label_smoothing": [Interval(Real, 0, 1, closed="left")],
        "class_weight": [dict, StrOptions({"balanced"}), None],
    }

    def __init__(
        self,
        hidden_layer_sizes: int | Sequence[int] = (100,),
        activation: str | Layer | Sequence[str | Layer] = "relu",
        *,
        solver: str | Optimizer = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str | Schedule = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        device: str | None = None,
        backend: str | None = None,
        dtype: str | None = None,
        dropout: float | Scheduled = 0.0,
        clip_norm: float | None = None,
        weight_decay: float | Scheduled | None = None,
        scoring: str | Callable[..., float] | None = None,
        callbacks: Sequence[Callback] | None = None,
        treatments: dict[str, Treatment] | None = None,
        architecture: BuildNetwork | None = None,
        label_smoothing: float = 0.0,
        loss: Loss | LossFunction | None = None,
        class_weight: dict[Any, float] | str | None = None,
    ) -> None:
        self._store(locals())

    def _learn_target(self, y: NDArray[Any], again: bool, incremental: bool) -> tuple[Loss, int]:
        """Set ``classes_``; return the loss and the number of logits."""
        kind = type_of_target(y, input_name="y")
        if kind == "multilabel-indicator":
            classes = np.arange(y.shape[1])
        elif kind in ("binary", "multiclass"):
            classes = np.unique(y)
        elif kind == "multiclass-multioutput":
            raise ValueError(
                f"Unknown label type: {kind}. Each of the {y.shape[1]} columns of y has classes of"
                " its own, but a row has one label here, or several that are 0 or 1 each: fit a"
                " classifier for each column (sklearn.multioutput.MultiOutputClassifier does)"
            )
        else:
            raise ValueError(
                f"Unknown label type: {kind}. Maybe you are trying to fit a classifier,"
                " which expects discrete classes on a regression target with continuous"
                " values."
            )
        several = kind == "multilabel-indicator"
        if again and several != getattr(self, "_multilabel", several):
            before, now = ("one label", "several") if several else ("several labels", "one")
            raise ValueError(f"`y`: the model was fitted to {before} a row, and is given {now}")
        if incremental:
            if np.setdiff1d(classes, self.classes_).size:
                raise ValueError(
                    "`y` has classes not in `self.classes_`. `self.classes_` has"
                    f" {self.classes_}. 'y' has {classes}."
                )
            classes = self.classes_
        elif again and not np.array_equal(classes, self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous"
                f" call to fit. Previously got {self.classes_}, `y` has {classes}"
            )
        self.classes_ = classes
        self._multilabel = several
        softmax = len(classes) > 2 and not self._multilabel
        cross_entropy = (SoftmaxCrossEntropy if softmax else BinaryCrossEntropy)(
            self.label_smoothing, clipped=True
        )
        n_outputs = len(classes) if softmax or self._multilabel else 1
        if self.loss is None:
            return cross_entropy, n_outputs
        if self.label_smoothing:
            raise ValueError("label_smoothing is for the cross-entropy: set it in the loss given")
        return chosen_loss(self.loss, {}, cross_entropy), n_outputs

    def _encode_target(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return labels in the loss's encoding: class numbers (int32), or 0.0 and 1.0."""
        if self._multilabel:
            if y.ndim != 2 or y.shape[1] != len(self.classes_):
                raise ValueError(f"y: expected {len(self.classes_)} labels a row, got {y.shape}")
            if not np.isin(y, (0, 1)).all():
                raise ValueError(f"y: several labels are 0 or 1 each, got {np.unique(y)}")
            return y.astype(np.float64)
        unknown = np.setdiff1d(y, self.classes_)
        if unknown.size:
            raise ValueError(
                f"labels {unknown[:5]} are not among the classes of y, {self.classes_}"
            )
        codes = np.searchsorted(self.classes_, y).astype(np.int32)
        return codes if len(self.classes_) > 2 else codes.astype(np.float64)

    @only_if(without_partial_fit)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Self:
        """Train for one epoch over X and y, continuing from the model's present state.

        Parameters
        ----------
        X : array-like (n_samples, n_features)
        y : array-like (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like (n_samples,), optional
        classes : array-like (n_classes,), optional
            All labels that may ever occur; required in the first call.

        Returns
        -------
        self

        Raises
        ------
        UnavailableError
            With early stopping, ``solver="lbfgs"``, or ``class_weight="balanced"``.  It is an
            AttributeError and a ValueError.
        ValueError, DivergenceError, BackendError
            As in `fit`; also if the classes are not those of the first call.
        """
        known = getattr(self, "classes_", None)
        given = known if classes is None else np.unique(to_host(classes))
        if given is None:
            raise ValueError("classes must be passed on the first call to partial_fit.")
        if known is not None and not np.array_equal(given, known):
            raise ValueError(
                f"`classes={classes!r}` is not the same as on last call to partial_fit,"
                f" was: {known!r}"
            )
        with self._unchanged_on_error():
            self.classes_ = given
            return self._fit(X, y, sample_weight, "partial")

    def _decide(self, z: Array, loss: Loss, xp: Any) -> Array:
        """Return class numbers (n,), or indicators (n, n_labels), from logits."""
        if loss.link_name == "softmax":
            return xp.argmax(z, axis=1)
        yes = xp.astype(z > 0.0, xp.int32)
        if not self._multilabel and len(self.classes_) == 1:
            yes = xp.zeros_like(yes)
        return yes[:, 0] if yes.shape[1] == 1 else yes

    def _probabilities(self, z: Array, loss: Loss, xp: Any) -> Array:
        """Return the probabilities of the classes, (n, n_classes), from logits."""
        if z.shape[1] > 1:
            return loss.link(z, xp)
        return xp.concat([sigmoid(-z, xp), sigmoid(z, xp)], axis=1)

    def predict(self, X: Any) -> Array:
        """Return the most probable class of each row.

        Parameters
        ----------
        X : array-like (n_samples, n_features)

        Returns
        -------
        y : array (n_samples,) or, for several labels, (n_samples, n_labels)
            Labels, in the namespace and on the device of X.  Labels of a dtype that this
            namespace lacks, such as strings, come as a NumPy array.
        """
        codes, home = self._predict_with(self._decide, X, "predict")
        if self._multilabel:
            return codes.astype(np.int64) if isinstance(home, NumPyBackend) else codes
        classes = self.classes_
        if not isinstance(home, NumPyBackend) and classes.dtype.kind in "biuf":
            labels = home.indices(classes) if classes.dtype.kind in "iu" else home.asarray(classes)
            # Large integers may not fit there: JAX has 32-bit integers by default
            if np.array_equal(home.to_host(labels), classes):
                with home.current():
                    return home.xp.take(labels, codes, axis=0)
        return classes[home.to_host(codes)]

    def predict_proba(self, X: Any) -> Array:
        """Return the probabilities of the classes.

        Parameters
        ----------
        X : array-like (n_samples, n_features)

        Returns
        -------
        p : array (n_samples, n_classes)
            Each row sums to one.  With several labels it does not: each column is the
            probability of one label.
        """
        return self._predict_with(self._probabilities, X, "predict_proba")[0]

    def predict_log_proba(self, X: Any) -> Array:
        """Return the logarithms of `predict_proba`.

        They are computed from the logits, so they are finite wherever the logits are.

        Parameters
        ----------
        X : array-like (n_samples, n_features)

        Returns
        -------
        log_p : array (n_samples, n_classes)
        """

        def logs(z: Array, loss: Loss, xp: Any) -> Array:
            if loss.link_name == "softmax":
                return log_softmax(z, xp)
            if z.shape[1] > 1:
                # Equal probabilities must have equal logarithms: above 0, sigmoid rounds to
                # the same float for many logits whose softplus still differs
                return xp.where(z > 0.0, xp.log(sigmoid(z, xp)), -softplus(-z, xp))
            return xp.concat([-softplus(z, xp), -softplus(-z, xp)], axis=1)

        return self._predict_with(logs, X, "predict_log_proba")[0]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy: the fraction of rows whose class is predicted correctly.

        With several labels, all labels of a row have to be correct.

        Parameters
        ----------
        X : array-like (n_samples, n_features)
        y : array-like (n_samples,) or (n_samples, n_outputs)
        sample_weight : array-like (n_samples,), optional

        Returns
        -------
        float
        """
        return self._score(X, y, sample_weight)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
