import pathlib
import re

README = pathlib.Path(__file__).parents[2] / "kernels" / "README.md"


def test_the_examples_of_the_readme_run_in_order():
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 9
    exec(compile("\n".join(examples), str(README), "exec"), {})
