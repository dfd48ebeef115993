"""The valley glacier: printed reference values, three equal NumPy forms, the hand adjoint, and what the ice must do."""

import numpy as np
import pytest

from backends.numpy_backend import NumPy
from problems import BadSize, Diverged, gold, shallow_ice, structure
from problems.shallow_ice import A_MAX, A_MIN, BOX, TASKS, TEMPERATURES, shallow_ice_numba, sia

SIZES = [
    ("rhs", {"N": 16}),
    ("rhs", {"N": 7, "A": 8e-17}),
    ("ude", {"N": 16, "years": 2}),
    ("ude", {"N": 7, "years": 2, "spy": 3}),
    ("semi_implicit", {"N": 12, "nst": 5}),
    ("semi_implicit", {"N": 7, "nst": 3, "A": 9e-17}),
    ("semi_implicit", {"N": 4, "nst": 2}),
    ("halfar", {"N": 11, "ns": 20}),
    ("halfar", {"N": 5, "ns": 3}),
    ("pseudo_transient", {"N": 12, "steps": 3}),
    ("pseudo_transient", {"N": 7, "steps": 2, "tol": 1e-7}),
]


def setup(name, **keys):
    size = TASKS[name].at(**keys)
    return size, *TASKS[name].inputs(size)


def run(name, size, theta, data):
    """Primal and adjoint in Numba."""
    impl = shallow_ice_numba.IMPLEMENTATION[name]["loops"]
    work = impl.prepare(structure(theta, data), size)
    loss, gradient = impl.strategies["adjoint"](theta, data, size, work)
    return impl.loss(theta, data, size, work), loss, gradient


def complex_step(name, size, theta, data):
    """The whole gradient of the statement."""
    loss = TASKS[name].forms["array"]
    return NumPy("cpu").complex_step(lambda theta, data: loss(theta, data, size))(theta, data)[1]


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_right_hand_side_has_the_printed_values():
    size, theta, data = setup("rhs", N=32)
    H = theta["H"]
    f = sia(H, data["B"], size.A, BOX / size.N)
    assert H.sum() == pytest.approx(18881.77777778, rel=1e-12)
    assert np.linalg.norm(f) == pytest.approx(10.1758431854, rel=1e-11)
    assert f[16, 16] == pytest.approx(-1.22498120299, rel=1e-11)
    _, _, gradient = run("rhs", size, theta, data)
    assert np.linalg.norm(gradient["H"]) == pytest.approx(1.362786934534, rel=1e-12)
    assert gradient["lnA"] == pytest.approx(-1.369276635846, rel=1e-12)


def test_ude_has_the_printed_values():
    size, theta, data = setup("ude", N=32)
    T = np.array(TEMPERATURES)
    three = [TEMPERATURES.index(t) for t in (0.0, -10.0, -20.0)]
    A_nn, A_fake = shallow_ice.fluidity(theta, T), A_MIN + (A_MAX - A_MIN) * ((T + 25) / 26) ** 2
    assert A_nn[three] / 1e-17 == pytest.approx([3.25790317767, 3.2476593831, 3.2379590125], rel=1e-11)
    assert A_fake[three] / 1e-17 == pytest.approx([7.39709097633, 2.66839275148, 0.304043639053], rel=1e-11)
    assert data["Href"][-1, 0].max() == pytest.approx(184.538999935, rel=1e-11)
    primal, loss, gradient = run("ude", size, theta, data)
    g = np.concatenate([gradient[block].ravel() for block in theta])
    assert primal == pytest.approx(0.237894364036, rel=1e-11)
    assert loss == pytest.approx(0.237894364036, rel=1e-11)
    assert np.linalg.norm(g) == pytest.approx(0.06836149640429, rel=1e-12)
    assert g[[0, 82]] == pytest.approx([-0.00582111765325, -0.0196185152399], rel=1e-11)


def test_scalar_version_has_the_printed_values():
    """L1(A) = mean((H(5 yr; A) - Href)^2), by A and by H0: what the adjoint passes on its way."""
    size, theta, data = setup("ude", N=32)
    w = shallow_ice_numba.ude_prepare(structure(theta, data), size)
    w.X[0] = data["H0"]
    shallow_ice_numba.trajectory(w.X, data["B"], w.unit * 4e-17, w.eps, w.ssp, w.rows)
    last_year = data["Href"][-1:, 0]
    loss, lnAb = shallow_ice_numba.trajectory_vjp(w.X, data["B"], last_year, w.unit * 4e-17, w.eps, w.ssp, w.L, w.rows)
    assert loss / 32**2 == pytest.approx(0.7814040722183, rel=1e-12)
    assert lnAb / 32**2 / 4 == pytest.approx(-0.499646281025, rel=1e-11)
    assert np.linalg.norm(w.L[3]) / 32**2 == pytest.approx(0.0458242520425, rel=1e-11)


@pytest.mark.parametrize(
    ("nst", "printed", "slope"), [(20, 1.732025046341, 2.95241034555), (60, 1.728615907864, 2.94387026158)]
)
def test_semi_implicit_has_the_printed_values(nst, printed, slope):
    primal, loss, gradient = run("semi_implicit", *setup("semi_implicit", N=32, nst=nst))
    assert [primal, loss] == pytest.approx([printed] * 2, rel=1e-12)
    assert gradient["lnA"] == pytest.approx(slope, rel=1e-11)


def test_halfar_s_dome_has_the_printed_values():
    s, R = shallow_ice.HALFAR_S, shallow_ice.HALFAR_R0 * shallow_ice.HALFAR_S ** (1 / 18)
    assert 0.4 * shallow_ice.HALFAR_A * shallow_ice.HALFAR_RHO_G**3 == pytest.approx(2.845713606598e-5, rel=1e-12)
    assert [shallow_ice.HALFAR_T0, s, R] == pytest.approx([422.45261107275, 60.1782352499, 941713.96439], rel=1e-11)
    profile = shallow_ice.halfar_profile(np.array([0.0, 300e3]), s + 1e-20j * (s - 1))  # ds/dlnA = s - 1
    assert profile.real == pytest.approx([2283.42634059, 2055.51341403], rel=1e-11)
    assert profile[0].imag / 1e-20 == pytest.approx(-249.497994671, rel=1e-11)


@pytest.mark.parametrize(
    ("N", "ns", "dome", "slope", "off"),
    [(31, 160, 2283.198749, -249.690165793, 0.153), (61, 640, 2283.903477, -249.69869487, 0.048)],
)
def test_halfar_has_the_printed_values(N, ns, dome, slope, off):
    """Of the field too: its derivative's distance from the exact one, over all but the margin."""
    size, theta, data = setup("halfar", N=N, ns=ns)
    H = shallow_ice.halfar_end({"lnA": theta["lnA"] + 1e-20j}, data, size)
    s, r = shallow_ice.HALFAR_S, shallow_ice.halfar_radius(size)
    exact = shallow_ice.halfar_profile(r, s + 1e-20j * (s - 1))
    inside = r < 0.9 * shallow_ice.HALFAR_R0 * s ** (1 / 18)
    assert error(H.imag[inside], exact.imag[inside]) == pytest.approx(off, abs=5e-4)
    assert H[N // 2, N // 2].real == pytest.approx(dome, abs=1e-6)
    assert H[N // 2, N // 2].imag / 1e-20 == pytest.approx(slope, rel=1e-10)
    assert H.real.sum() == pytest.approx(data["H0"].sum(), rel=1e-13)  # nothing is lost,
    assert abs(H.imag.sum()) < 1e-12 * np.abs(H.imag).sum()  # whatever A is


def test_pseudo_transient_has_the_printed_values():
    size, theta, data = setup("pseudo_transient")
    counts = []
    loss = shallow_ice.pseudo_transient({"lnA": theta["lnA"] + 1e-20j}, data, size, counts)
    assert [size.N, size.steps, counts[0], counts[-1]] == [100, 10, 77, 47]
    assert loss.real == pytest.approx(1443.44176339, rel=1e-11)
    assert loss.imag / 1e-20 == pytest.approx(-20.3210677, rel=1e-8)


def test_pseudo_transient_by_numba_has_the_printed_values():
    """The derivative at a practical tolerance is 0.9 % off that of the root."""
    for tol, printed, slope in (
        (1e-4, 1443.44176339, -20.3210677),
        (1e-8, 1443.39861779, -20.50476529),
        (1e-11, 1443.39861326, -20.5048042),
    ):
        primal, loss, gradient = run("pseudo_transient", *setup("pseudo_transient", tol=tol))
        assert [primal, loss] == pytest.approx([printed] * 2, rel=1e-11)
        assert gradient["lnA"] == pytest.approx(slope, rel=2e-9)


def test_halfar_s_derivative_tends_to_the_exact_one():
    for N, ns, off in (61, 640, 6.5e-4), (121, 2560, 3e-4):
        _, dome, gradient = run("halfar", *setup("halfar", N=N, ns=ns))
        assert gradient["lnA"] / dome == pytest.approx(-0.109264744054, rel=off)


def test_what_does_not_converge_says_so():
    size, theta, data = setup("pseudo_transient", N=8, steps=2)
    theta["lnA"] = np.array(10.0)  # so stiff a plate was not thought of
    for loss in TASKS["pseudo_transient"].forms.values():
        with pytest.raises(Diverged, match="give a larger tol"):
            loss(theta, data, size)
    impl = shallow_ice_numba.IMPLEMENTATION["pseudo_transient"]["loops"]
    for call in (impl.loss, *impl.strategies.values()):
        with pytest.raises(Diverged, match="give a larger tol"):
            call(theta, data, size, impl.prepare(structure(theta, data), size))


def test_sizes_of_halfar_and_pseudo_transient():
    for name, keys, why in (
        ("halfar", {"N": 12, "ns": 3}, "odd N, as in N=13"),
        ("pseudo_transient", {"tol": 0}, "between 0 and 1"),
        ("pseudo_transient", {"tol": 2}, "between 0 and 1"),
    ):
        with pytest.raises(BadSize, match=why):
            TASKS[name].at(**keys)


def test_reference_at_64():
    size, _, data = setup("ude", N=64)
    assert data["Href"][-1, 0].max() == pytest.approx(184.928385993, rel=1e-11)


@pytest.mark.parametrize(("name", "keys"), SIZES)
def test_three_forms_and_numba_are_one_program(name, keys):
    size, theta, data = setup(name, **keys)
    losses = {form: loss(theta, data, size) for form, loss in TASKS[name].forms.items()}
    primal, loss, _ = run(name, size, theta, data)
    for value in (*losses.values(), primal, loss):
        assert value == pytest.approx(losses["array"], rel=1e-12 if name == "ude" and size.N == 7 else 1e-13)


@pytest.mark.parametrize(("name", "keys"), SIZES)
def test_adjoint_against_complex_step(name, keys):
    size, theta, data = setup(name, **keys)
    reference = complex_step(name, size, theta, data)
    _, _, gradient = run(name, size, theta, data)
    for block in theta:
        assert error(gradient[block], reference[block]) < 1e-12, block


@pytest.mark.parametrize(("name", "keys"), SIZES)
def test_forms_are_complex_step_safe(name, keys):
    size, theta, data = setup(name, **keys)
    flat = gold(sum(block.size for block in theta.values()), 11)
    direction, k = {}, 0
    for block, value in theta.items():
        direction[block] = flat[k : k + value.size].reshape(value.shape)
        k += value.size
    up = {block: theta[block] + 1e-20j * direction[block] for block in theta}
    slopes = [np.imag(loss(up, data, size)) / 1e-20 for loss in TASKS[name].forms.values()]
    _, _, gradient = run(name, size, theta, data)
    slopes.append(sum(np.vdot(gradient[block], direction[block]) for block in theta))
    assert slopes == pytest.approx([slopes[0]] * len(slopes), rel=1e-11)


def test_adjoint_on_rough_ice_that_reaches_the_boundary():
    """Neither smooth nor symmetric, ice on the boundary, holes of negative H: every cap and every branch is taken."""
    size, theta, data = setup("rhs", N=11)
    theta["H"] = 40 * gold(121, 5).reshape(11, 11) + 10
    data["B"] = data["B"] + 60 * gold(121, 9).reshape(11, 11)
    reference = complex_step("rhs", size, theta, data)
    assert np.any(reference["H"][0]), "this test wants ice on the boundary"
    _, _, gradient = run("rhs", size, theta, data)
    assert error(gradient["H"], reference["H"]) < 1e-13
    assert gradient["lnA"] == pytest.approx(reference["lnA"], rel=1e-12)
    assert np.all(gradient["H"][theta["H"] <= 0] == 0)


@pytest.mark.parametrize("thickness", [10.0, -30.0])
def test_semi_implicit_adjoint_on_rough_ice(thickness):
    """On the boundary too, with holes; or nowhere."""
    size, theta, data = setup("semi_implicit", N=11, nst=4)
    theta["H0"] = 40 * gold(121, 5).reshape(11, 11) + thickness
    data["B"] = data["B"] + 60 * gold(121, 9).reshape(11, 11)
    reference = complex_step("semi_implicit", size, theta, data)
    _, _, gradient = run("semi_implicit", size, theta, data)
    assert error(gradient["H0"], reference["H0"]) < 1e-13
    assert gradient["lnA"] == pytest.approx(reference["lnA"], rel=1e-12)


def test_implicit_steps_end_where_small_explicit_steps_do():
    """H after 5 years, where no cap binds: the change by the implicit scheme tends to that of the explicit one."""
    B, H0 = shallow_ice.valley(32)
    explicit = shallow_ice.snapshots_inplace(np.array([4e-17]), B, H0, TASKS["ude"].at(N=32))[-1, 0]
    thick = H0 > 100
    for nst, limit in (20, 2e-2), (160, 4e-3):
        H, dx, dt = H0, BOX / 32, shallow_ice.YEARS / nst
        for _ in range(nst):
            Kx, Ky = shallow_ice.conductance(H, B, 4e-17, dx, dt)
            H = np.maximum(H + shallow_ice.pad(shallow_ice.solve(Kx, Ky, shallow_ice.flow(Kx, Ky, B + H))), 0)
        assert error((H - H0)[thick], (explicit - H0)[thick]) < limit


def test_the_banded_solve_is_the_sparse_one():
    B, H0 = shallow_ice.valley(13)
    b = gold(2 * 121).reshape(2, 11, 11)
    for H in H0, np.zeros_like(H0), 50 + H0:
        Kx, Ky = shallow_ice.conductance(H, B, 4e-17, BOX / 13, 1.0)
        x = shallow_ice.substitute(shallow_ice.cholesky(Kx, Ky), b)
        for k in range(2):
            assert x[k] == pytest.approx(shallow_ice.solve(Kx, Ky, b[k]), rel=1e-12, abs=1e-14)


def test_ice_is_conserved_and_flows_downhill():
    size, _, data = setup("ude", N=16)
    volume = data["Href"].sum((2, 3))
    assert volume == pytest.approx(np.full(volume.shape, data["H0"].sum()), rel=1e-13)
    assert data["Href"].min() >= 0
    x = np.arange(16)[:, None]
    down = (data["Href"][-1] * x).sum((1, 2)) / volume[-1] - (data["H0"] * x).sum() / data["H0"].sum()
    assert np.all(np.diff(down) < 0) and down[-1] > 0  # warm ice flows further, and the bed falls with x


def test_steps_a_year():
    for N, spy in ((4, 1), (7, 1), (32, 12), (33, 13), (64, 48), (128, 192), (256, 768)):
        assert shallow_ice.steps_a_year(TASKS["ude"].at(N=N)) == spy
    assert shallow_ice.steps_a_year(TASKS["ude"].at(N=32, spy=40)) == 40
    for keys in ({"N": 3}, {"N": 8, "years": 0}, {"N": 8, "spy": -1}):
        with pytest.raises(BadSize, match="too small"):
            TASKS["ude"].at(**keys)
