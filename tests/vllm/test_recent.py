"""The memory of models by name, which is limited in time and in size."""

from worker.vllm.servers.recent import Recent


def test_a_value_is_kept_for_its_time() -> None:
    now = [0.0]
    recent: Recent[str] = Recent(lambda: now[0], 60)
    recent.put("x", "first")
    now[0] = 59
    assert (recent.get("x"), "y" in recent) == ("first", False)
    recent.put("x", "second")
    now[0] = 118
    assert recent.get("x") == "second"
    now[0] = 119
    assert "x" not in recent
    recent.put("x", "third")
    recent.drop("x")
    assert "x" not in recent


def test_names_from_jobs_do_not_fill_the_memory() -> None:
    """There may be any number of names, of any length."""
    recent: Recent[bool] = Recent(lambda: 0.0, 60)
    for n in range(3000):
        recent.put(f"{n} \ud800" + "x" * 10_000, True)
    assert len(recent._values) == 1000
    assert all(len(key) == 16 for key in recent._values)
    assert f"{2999} \ud800" + "x" * 10_000 in recent
    assert f"{1999} \ud800" + "x" * 10_000 not in recent
