"""qwq-quant recipes: what ships, and what stands in it."""

import json

import click

from quant.cli import options


@click.command("recipes")
@click.argument("name", required=False, metavar="[NAME|FILE]")
@click.option(
    "--schema", is_flag=True, help="Print the form of a recipe as JSON schema, for editors."
)
@options.output_format
@options.debug
def command(name, schema, output_format):
    """List the recipes and their sampling profiles, or print one recipe with its comments.

    A recipe says what is known of a family of models: by what it is recognised, which values its
    files should have, how its context is stretched, and how it is sampled. FILE is checked.

    \b
    Examples:
      qwq-quant recipes
      qwq-quant recipes qwq-32b > mine.toml
      qwq-quant recipes --schema > recipe.schema.json
    """
    from quant.recipe import json_schema, read_recipe, recipe_names, recipe_text

    if schema:
        click.echo(json.dumps(json_schema(), indent=1))
    elif name is not None:
        recipe = read_recipe(name)
        if output_format == "json":
            click.echo(recipe.model_dump_json(indent=1, exclude_none=True))
        else:
            click.echo(recipe_text(name), nl=False)
    elif output_format == "json":
        recipes = [read_recipe(n).model_dump(exclude_none=True) for n in recipe_names()]
        click.echo(json.dumps(recipes, indent=1))
    else:
        for recipe in map(read_recipe, recipe_names()):
            _print(recipe)


def _print(recipe) -> None:
    import textwrap

    thinks = ", thinks" if recipe.thinks else ""
    click.echo(f"{recipe.name}  {recipe.title}{thinks}")
    for i, (name, profile) in enumerate(recipe.profiles.items()):
        default = " (default)" if i == 0 else ""
        lines = textwrap.wrap(f"{profile.about}{default}", 80 - 28)
        for label, line in zip([name, *[""] * len(lines)], lines, strict=False):
            click.echo(f"  {label:<24}  {line}")
