"""Kernels compiled beforehand, by NVRTC and without a GPU."""

def _tk_cubins_impl(ctx):
    folder = ctx.actions.declare_directory(ctx.label.name)
    arguments = ctx.actions.args()
    arguments.add("--output", folder.path)
    arguments.add_all(ctx.attr.kernels, format_each = "--only=%s")
    ctx.actions.run(
        arguments = [arguments],
        executable = ctx.executable._compiler,
        mnemonic = "TkCubins",
        outputs = [folder],
        progress_message = "Compiling kernels for %s" % ctx.label,
        # Exactly what is asked for goes into the folder, whatever the user's settings are.
        env = {
            "JAX_PLATFORMS": "cpu",
            "TK_JAX_CACHE_DIR": "off",
            "TK_JAX_CUBINS": "",
        },
    )
    return [DefaultInfo(
        files = depset([folder]),
        runfiles = ctx.runfiles([folder]),
    )]

tk_cubins = rule(
    implementation = _tk_cubins_impl,
    doc = """A folder of compiled kernels, which a program then needs no NVRTC for.

    The folder is named like the rule. tk_jax finds it where it is tk_jax/cubins, or where the
    environment variable TK_JAX_CUBINS names it.""",
    attrs = {
        "kernels": attr.string_list(
            allow_empty = False,
            doc = """Names of kernels or ops, or parts of them, each at least one of those that
            `python -m tk_jax.compile --list` prints.""",
            mandatory = True,
        ),
        # In the target's configuration, like the program it serves: the extension is built once.
        "_compiler": attr.label(
            cfg = "target",
            default = "//bazel:make_cubins",
            executable = True,
        ),
    },
)
