"""Preferences, settings, operators and the panel of the add-on."""

# No `from __future__ import annotations`: Blender reads properties from annotations.

import textwrap

import bpy
from bpy.props import (
    BoolProperty,
    CollectionProperty,
    FloatProperty,
    IntProperty,
    PointerProperty,
    StringProperty,
)

from . import developments, pixels
from .receiver import Server

LINE_LENGTH = 38
"""Characters of an error message in one line of the panel, since labels do not wrap."""


class SafelightPreferences(bpy.types.AddonPreferences):
    """Address and key of the server. Blender stores them in the user's preferences, the key too, in plain text."""

    bl_idname = __package__

    server: StringProperty(
        name="Server", description="HOST:PORT; several replicas are separated by commas", default="127.0.0.1:8421"
    )
    api_key: StringProperty(name="API key", description="Empty: none", subtype="PASSWORD")
    tls: BoolProperty(name="TLS", description="Connect by TLS. A key that is sent without it can be read on its way")
    ca_file: StringProperty(
        name="Authorities",
        description="A PEM file of the authorities to trust. Empty: those of gRPC",
        subtype="FILE_PATH",
    )
    server_name: StringProperty(
        name="Server's name", description="The name in its certificate, where it differs from the address"
    )

    def draw(self, context: bpy.types.Context) -> None:
        self.layout.use_property_split = True
        for name in ("server", "api_key", "tls"):
            self.layout.prop(self, name)
        column = self.layout.column()
        column.enabled = self.tls
        column.prop(self, "ca_file")
        column.prop(self, "server_name")


def preferences() -> SafelightPreferences:
    """The add-on's preferences."""
    found: SafelightPreferences = bpy.context.preferences.addons[__package__].preferences
    return found


def server() -> Server:
    """The server that the preferences name."""
    chosen = preferences()
    return Server(chosen.server, chosen.api_key, chosen.tls, bpy.path.abspath(chosen.ca_file), chosen.server_name)


def offered_models(self: object, context: bpy.types.Context, typed: str) -> list[str]:
    """Suggestions for the model field."""
    return [model for model in developments.state.models if typed.lower() in model.lower()]


class Fields:
    """Properties of a request, which the scene and the operator have in common."""

    prompt: StringProperty(name="Prompt", description="What the picture shows", options={"SKIP_SAVE"})
    negative_prompt: StringProperty(
        name="Negative", description="What the picture is led away from", options={"SKIP_SAVE"}
    )
    model: StringProperty(
        name="Model",
        description="Its id. Empty: the server's default",
        search=offered_models,
        search_options={"SUGGESTION"},
        options={"SKIP_SAVE"},
    )
    seed: IntProperty(name="Seed", description="-1: another one each time", default=-1, min=-1, options={"SKIP_SAVE"})
    steps: IntProperty(
        name="Steps", description="Denoising steps. 0: the model's default", min=0, soft_max=100, options={"SKIP_SAVE"}
    )
    width: IntProperty(
        name="Width",
        description="One of the model's sizes. 0: its default",
        min=0,
        subtype="PIXEL",
        options={"SKIP_SAVE"},
    )
    height: IntProperty(
        name="Height",
        description="One of the model's sizes. 0: its default",
        min=0,
        subtype="PIXEL",
        options={"SKIP_SAVE"},
    )
    guidance_scale: FloatProperty(
        name="Guidance",
        description="How closely the prompt is followed. 0: the model's default",
        min=0,
        soft_max=20,
        options={"SKIP_SAVE"},
    )
    strength: FloatProperty(
        name="Strength",
        description="How much of the image to start from is given up",
        default=0.8,
        min=0.01,
        max=1,
        subtype="FACTOR",
        options={"SKIP_SAVE"},
    )


class SafelightSettings(bpy.types.PropertyGroup, Fields):
    """The settings of a scene, saved with it."""

    image: PointerProperty(name="Image", description="The newest that was asked for", type=bpy.types.Image)
    init_image: PointerProperty(
        name="Start from", description="An image to start from in place of noise", type=bpy.types.Image
    )


class SafelightRow(bpy.types.PropertyGroup):
    """A row of the panel: the progress of one generation."""

    title: StringProperty()
    percent: FloatProperty(subtype="PERCENTAGE", min=0, max=100, precision=0)


class SAFELIGHT_OT_develop(bpy.types.Operator, Fields):
    """Ask the server for a picture and show it in a new image while it develops"""

    bl_idname = "safelight.develop"
    bl_label = "Develop"
    bl_options = {"UNDO"}

    init_image: StringProperty(name="Start from", description="The name of an image", options={"SKIP_SAVE"})
    wait: BoolProperty(
        name="Wait", description="Return when the picture is there: for scripts", options={"SKIP_SAVE", "HIDDEN"}
    )

    def execute(self, context: bpy.types.Context) -> set[str]:
        prompt = self._value(context, "prompt")
        if not prompt:
            self.report({"ERROR"}, "prompt: say what the picture shows")
            return {"CANCELLED"}
        try:
            options = self._options(context)
        except ValueError as error:
            self.report({"ERROR"}, str(error))
            return {"CANCELLED"}
        development, image = developments.start(server(), prompt, options)
        context.scene.safelight.image = image
        _put_into_view(context, image)
        if not self.wait:
            return {"FINISHED"}
        developments.wait(development)
        if (failure := development.generation.failure) is not None:
            self.report({"ERROR"}, f"{failure.reason}: {failure.message}")
            return {"CANCELLED"}
        return {"FINISHED"}

    def _value(self, context: bpy.types.Context, name: str) -> object:
        """The operator's own property if it was set, else the scene's."""
        return getattr(self if self.properties.is_property_set(name) else context.scene.safelight, name)

    def _options(self, context: bpy.types.Context) -> dict[str, object]:
        """The client's arguments. Raises ValueError if the chosen image cannot be an init image."""
        names = ("negative_prompt", "model", "steps", "width", "height", "guidance_scale")
        options = {name: value for name in names if (value := self._value(context, name))}
        if (seed := self._value(context, "seed")) >= 0:
            options["seed"] = seed
        image = context.scene.safelight.init_image
        if self.properties.is_property_set("init_image"):
            image = bpy.data.images.get(self.init_image)
            if image is None and self.init_image:
                raise ValueError(f"init_image: there is no image {self.init_image}")
        if image is not None:
            options |= {"init_image": pixels.to_png(image), "strength": self._value(context, "strength")}
        return options


class SAFELIGHT_OT_cancel(bpy.types.Operator):
    """Stop all that develops, at the server"""

    bl_idname = "safelight.cancel"
    bl_label = "Cancel"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return bool(developments.state.running)

    def execute(self, context: bpy.types.Context) -> set[str]:
        developments.cancel()
        return {"FINISHED"}


class SAFELIGHT_OT_list_models(bpy.types.Operator):
    """Ask the server for its models, which the field then proposes"""

    bl_idname = "safelight.list_models"
    bl_label = "List Models"

    def execute(self, context: bpy.types.Context) -> set[str]:
        developments.list_models(server())
        return {"FINISHED"}


class Panel:
    """The panel, which is the same in each editor."""

    bl_label = "Safelight"
    bl_region_type = "UI"
    bl_category = "Safelight"

    def draw(self, context: bpy.types.Context) -> None:
        settings, layout = context.scene.safelight, self.layout
        layout.use_property_split, layout.use_property_decorate = True, False
        layout.prop(preferences(), "server")
        row = layout.row(align=True)
        row.prop(settings, "model")
        row.operator("safelight.list_models", text="", icon="FILE_REFRESH")
        layout.prop(settings, "prompt")
        layout.prop(settings, "negative_prompt")
        layout.prop(settings, "seed")
        layout.prop(settings, "steps")
        layout.prop(settings, "guidance_scale")
        column = layout.column(align=True)
        column.prop(settings, "width")
        column.prop(settings, "height")
        layout.prop(settings, "init_image")
        if settings.init_image is not None:
            layout.prop(settings, "strength")
        row = layout.row(align=True)
        develop = row.row(align=True)
        develop.enabled = bool(settings.prompt)
        develop.operator("safelight.develop", icon="RENDER_STILL")
        row.operator("safelight.cancel", icon="CANCEL")
        for progress in context.window_manager.safelight_rows:
            layout.label(text=progress.title)
            bar = layout.row()
            bar.enabled = False
            bar.prop(progress, "percent", text="", slider=True)
        if (failure := developments.state.failure) is not None:
            box = layout.box()
            box.label(text=failure.reason, icon="ERROR")
            for line in textwrap.wrap(failure.message, LINE_LENGTH):
                box.label(text=line)


class SAFELIGHT_PT_image_editor(Panel, bpy.types.Panel):
    bl_space_type = "IMAGE_EDITOR"


class SAFELIGHT_PT_view_3d(Panel, bpy.types.Panel):
    bl_space_type = "VIEW_3D"


class SAFELIGHT_PT_shader_editor(Panel, bpy.types.Panel):
    bl_space_type = "NODE_EDITOR"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return bool(context.space_data.tree_type == "ShaderNodeTree")


def _put_into_view(context: bpy.types.Context, image: bpy.types.Image) -> None:
    """Shows an image in the editor that requested it: the image editor, or the active node of the shader editor."""
    space = context.space_data
    if space is None:
        return
    if space.type == "IMAGE_EDITOR":
        space.image = image
    elif space.type == "NODE_EDITOR":
        node = getattr(context, "active_node", None)
        if node is not None and node.bl_idname == "ShaderNodeTexImage":
            node.image = image


CLASSES = (
    SafelightPreferences,
    SafelightSettings,
    SafelightRow,
    SAFELIGHT_OT_develop,
    SAFELIGHT_OT_cancel,
    SAFELIGHT_OT_list_models,
    SAFELIGHT_PT_image_editor,
    SAFELIGHT_PT_view_3d,
    SAFELIGHT_PT_shader_editor,
)


def register() -> None:
    """Registers all classes and properties with Blender."""
    for one in CLASSES:
        bpy.utils.register_class(one)
    bpy.types.Scene.safelight = PointerProperty(type=SafelightSettings)
    bpy.types.WindowManager.safelight_rows = CollectionProperty(type=SafelightRow, options={"SKIP_SAVE"})


def unregister() -> None:
    """Unregisters all classes and properties."""
    del bpy.types.WindowManager.safelight_rows
    del bpy.types.Scene.safelight
    for one in reversed(CLASSES):
        bpy.utils.unregister_class(one)
