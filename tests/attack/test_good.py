import attack
import pytest

RUN = [name for name in attack.COMMANDS if name not in ("pull", "demo", "bench")]


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("name", RUN)
def test_what_the_attack_changes_is_good(name):
    assert attack.run(attack.COMMANDS[name].split()) == 0
