/*
 * safelightsrc: a GStreamer source that gives the previews of a picture as video.
 *
 *   gst-launch-1.0 safelightsrc prompt="a red potion" ! videoconvert ! pngenc ! multifilesink location=step-%02d.png
 *
 * Each preview is a frame, and the finished picture is the last frame. Frames are RGBA in the picture's size; a frame's
 * timestamp is the time at which it came. create() waits for the server in short slices, so that unlock() can end the
 * wait.
 */
#include "safelightsrc.h"

#include <gst/video/video.h>
#include <safelight.h>
#include <string.h>

GST_DEBUG_CATEGORY_STATIC(safelight_src_debug);
#define GST_CAT_DEFAULT safelight_src_debug

enum {
  PROP_0,
  PROP_SERVER,
  PROP_PROMPT,
  PROP_NEGATIVE_PROMPT,
  PROP_MODEL,
  PROP_WIDTH,
  PROP_HEIGHT,
  PROP_STEPS,
  PROP_GUIDANCE_SCALE,
  PROP_SEED,
  PROP_EVERY_N_STEPS,
  PROP_TIMEOUT,
  PROP_API_KEY,
  PROP_CA_FILE,
  PROP_SERVER_NAME
};

#define WAIT_S 0.05 /* the longest time until unlock() ends a wait */

struct _SafelightSrc {
  GstPushSrc parent;

  gchar *server, *prompt, *negative_prompt, *model, *api_key, *ca_file, *server_name;
  gint width, height, steps, every_n_steps;
  gdouble guidance_scale, timeout;
  gint64 seed;

  safelight_client *client;
  safelight_generation *generation;
  GstVideoInfo info; /* format of the frames; invalid before the first one */
  gboolean has_picture;
  gint flushing; /* atomic */
};

G_DEFINE_TYPE(SafelightSrc, safelight_src, GST_TYPE_PUSH_SRC)

static GstStaticPadTemplate src_template =
    GST_STATIC_PAD_TEMPLATE("src", GST_PAD_SRC, GST_PAD_ALWAYS, GST_STATIC_CAPS(GST_VIDEO_CAPS_MAKE("RGBA")));

static void set_property(GObject *object, guint id, const GValue *value, GParamSpec *spec) {
  SafelightSrc *self = SAFELIGHT_SRC(object);
  gchar **text = NULL;
  switch (id) {
    case PROP_SERVER: text = &self->server; break;
    case PROP_PROMPT: text = &self->prompt; break;
    case PROP_NEGATIVE_PROMPT: text = &self->negative_prompt; break;
    case PROP_MODEL: text = &self->model; break;
    case PROP_API_KEY: text = &self->api_key; break;
    case PROP_CA_FILE: text = &self->ca_file; break;
    case PROP_SERVER_NAME: text = &self->server_name; break;
    case PROP_WIDTH: self->width = g_value_get_int(value); break;
    case PROP_HEIGHT: self->height = g_value_get_int(value); break;
    case PROP_STEPS: self->steps = g_value_get_int(value); break;
    case PROP_EVERY_N_STEPS: self->every_n_steps = g_value_get_int(value); break;
    case PROP_GUIDANCE_SCALE: self->guidance_scale = g_value_get_double(value); break;
    case PROP_TIMEOUT: self->timeout = g_value_get_double(value); break;
    case PROP_SEED: self->seed = g_value_get_int64(value); break;
    default: G_OBJECT_WARN_INVALID_PROPERTY_ID(object, id, spec);
  }
  if (text) {
    g_free(*text);
    *text = g_value_dup_string(value);
  }
}

static void get_property(GObject *object, guint id, GValue *value, GParamSpec *spec) {
  SafelightSrc *self = SAFELIGHT_SRC(object);
  switch (id) {
    case PROP_SERVER: g_value_set_string(value, self->server); break;
    case PROP_PROMPT: g_value_set_string(value, self->prompt); break;
    case PROP_NEGATIVE_PROMPT: g_value_set_string(value, self->negative_prompt); break;
    case PROP_MODEL: g_value_set_string(value, self->model); break;
    case PROP_CA_FILE: g_value_set_string(value, self->ca_file); break;
    case PROP_SERVER_NAME: g_value_set_string(value, self->server_name); break;
    case PROP_WIDTH: g_value_set_int(value, self->width); break;
    case PROP_HEIGHT: g_value_set_int(value, self->height); break;
    case PROP_STEPS: g_value_set_int(value, self->steps); break;
    case PROP_EVERY_N_STEPS: g_value_set_int(value, self->every_n_steps); break;
    case PROP_GUIDANCE_SCALE: g_value_set_double(value, self->guidance_scale); break;
    case PROP_TIMEOUT: g_value_set_double(value, self->timeout); break;
    case PROP_SEED: g_value_set_int64(value, self->seed); break;
    default: G_OBJECT_WARN_INVALID_PROPERTY_ID(object, id, spec);
  }
}

static gboolean fail(SafelightSrc *self, safelight_error *error) {
  GST_ELEMENT_ERROR(self, RESOURCE, OPEN_READ, ("%s", error ? safelight_error_message(error) : "out of memory"), (NULL));
  safelight_error_free(error);
  return FALSE;
}

static safelight_request *new_request(SafelightSrc *self) {
  safelight_request *request = safelight_request_new(self->prompt);
  if (!request) return NULL;
  safelight_request_set_model(request, self->model);
  safelight_request_set_negative_prompt(request, self->negative_prompt);
  if (self->width || self->height) safelight_request_set_size(request, self->width, self->height);
  if (self->steps) safelight_request_set_num_inference_steps(request, self->steps);
  if (self->guidance_scale >= 0) safelight_request_set_guidance_scale(request, self->guidance_scale);
  if (self->seed >= 0) safelight_request_add_output(request, (guint64)self->seed);
  if (self->every_n_steps > 1) safelight_request_set_preview_every_n_steps(request, self->every_n_steps);
  return request;
}

static safelight_options *new_options(SafelightSrc *self, GError **problem) {
  gchar *pem = NULL;
  safelight_options *options;
  if (self->ca_file && *self->ca_file && !g_file_get_contents(self->ca_file, &pem, NULL, problem)) return NULL;
  options = safelight_options_new();
  if (options) {
    safelight_options_set_api_key(options, self->api_key);
    if (pem) safelight_options_set_tls(options, pem, self->server_name);
  }
  g_free(pem);
  return options;
}

static gboolean start(GstBaseSrc *base) {
  SafelightSrc *self = SAFELIGHT_SRC(base);
  safelight_error *error = NULL;
  GError *problem = NULL;
  safelight_request *request;
  safelight_options *options = new_options(self, &problem);
  if (problem) {
    GST_ELEMENT_ERROR(self, RESOURCE, NOT_FOUND, ("ca-file: %s", problem->message), (NULL));
    g_error_free(problem);
    return FALSE;
  }
  gst_video_info_init(&self->info);
  self->has_picture = FALSE;
  self->client = safelight_client_new(self->server, options, &error);
  safelight_options_free(options);
  if (!self->client) return fail(self, error);
  request = new_request(self);
  self->generation = safelight_generate(self->client, request, self->timeout, &error);
  safelight_request_free(request);
  if (self->generation) return TRUE;
  safelight_client_free(self->client); /* stop() is not called after start() has failed */
  self->client = NULL;
  return fail(self, error);
}

static gboolean stop(GstBaseSrc *base) {
  SafelightSrc *self = SAFELIGHT_SRC(base);
  safelight_generation_free(self->generation);
  safelight_client_free(self->client);
  self->generation = NULL;
  self->client = NULL;
  return TRUE;
}

static gboolean unlock(GstBaseSrc *base) {
  g_atomic_int_set(&SAFELIGHT_SRC(base)->flushing, 1);
  return TRUE;
}

static gboolean unlock_stop(GstBaseSrc *base) {
  g_atomic_int_set(&SAFELIGHT_SRC(base)->flushing, 0);
  return TRUE;
}

static gboolean is_seekable(GstBaseSrc *base) {
  (void)base;
  return FALSE;
}

/* Scales all frames to the size of the picture: previews may be smaller, and encoders accept no change of size. */
static gboolean negotiate(SafelightSrc *self) {
  gint32 width, height;
  GstCaps *caps;
  gboolean taken;
  if (GST_VIDEO_INFO_FORMAT(&self->info) == GST_VIDEO_FORMAT_RGBA) return TRUE;
  if (!safelight_generation_size(self->generation, &width, &height)) return FALSE;
  if (!gst_video_info_set_format(&self->info, GST_VIDEO_FORMAT_RGBA, (guint)width, (guint)height)) return FALSE;
  GST_VIDEO_INFO_FPS_N(&self->info) = 0; /* a variable frame rate */
  GST_VIDEO_INFO_FPS_D(&self->info) = 1;
  caps = gst_video_info_to_caps(&self->info);
  taken = gst_base_src_set_caps(GST_BASE_SRC(self), caps);
  gst_caps_unref(caps);
  return taken;
}

static GstFlowReturn push_image(SafelightSrc *self, const safelight_image *image, GstBuffer **buffer) {
  GstMapInfo map;
  gint32 copied;
  if (!negotiate(self)) return GST_FLOW_NOT_NEGOTIATED;
  *buffer = gst_buffer_new_allocate(NULL, GST_VIDEO_INFO_SIZE(&self->info), NULL);
  if (!*buffer || !gst_buffer_map(*buffer, &map, GST_MAP_WRITE)) return GST_FLOW_ERROR;
  copied = safelight_image_scale_rgba8(image, map.data, map.size, (gsize)GST_VIDEO_INFO_PLANE_STRIDE(&self->info, 0), 0,
                                       GST_VIDEO_INFO_WIDTH(&self->info), GST_VIDEO_INFO_HEIGHT(&self->info));
  gst_buffer_unmap(*buffer, &map);
  if (copied == SAFELIGHT_COPIED) return GST_FLOW_OK;
  gst_clear_buffer(buffer);
  GST_ELEMENT_ERROR(self, STREAM, FORMAT, ("the server sent an image that is not raw RGBA8"), (NULL));
  return GST_FLOW_ERROR;
}

static GstFlowReturn create(GstPushSrc *push, GstBuffer **buffer) {
  SafelightSrc *self = SAFELIGHT_SRC(push);
  for (;;) {
    safelight_event *event;
    if (g_atomic_int_get(&self->flushing)) return GST_FLOW_FLUSHING;
    event = safelight_generation_next(self->generation, WAIT_S);
    if (event) {
      const safelight_image *image = safelight_event_image(event);
      GstFlowReturn result = GST_FLOW_CUSTOM_SUCCESS;
      if (image && !self->has_picture) result = push_image(self, image, buffer);
      self->has_picture |= safelight_event_get_kind(event) == SAFELIGHT_EVENT_PICTURE;
      safelight_event_free(event);
      if (result != GST_FLOW_CUSTOM_SUCCESS) return result;
    } else if (safelight_generation_state(self->generation) >= SAFELIGHT_STATE_SUCCEEDED) {
      const safelight_error *error = safelight_generation_error(self->generation);
      gint32 i;
      GString *more;
      if (!error) return GST_FLOW_EOS;
      more = g_string_new(safelight_error_reason(error));
      for (i = 0; i < safelight_error_num_violations(error); ++i) {
        g_string_append_printf(more, "\n%s: %s", safelight_error_violation_field(error, i),
                               safelight_error_violation_description(error, i));
      }
      GST_ELEMENT_ERROR(self, RESOURCE, READ, ("%s", safelight_error_message(error)), ("%s", more->str));
      g_string_free(more, TRUE);
      return GST_FLOW_ERROR;
    }
  }
}

static void finalize(GObject *object) {
  SafelightSrc *self = SAFELIGHT_SRC(object);
  g_free(self->server);
  g_free(self->prompt);
  g_free(self->negative_prompt);
  g_free(self->model);
  g_free(self->api_key);
  g_free(self->ca_file);
  g_free(self->server_name);
  G_OBJECT_CLASS(safelight_src_parent_class)->finalize(object);
}

static void safelight_src_init(SafelightSrc *self) {
  self->server = g_strdup("127.0.0.1:8421");
  self->guidance_scale = -1;
  self->seed = -1;
  self->every_n_steps = 1;
  gst_base_src_set_format(GST_BASE_SRC(self), GST_FORMAT_TIME);
  gst_base_src_set_live(GST_BASE_SRC(self), TRUE); /* the server decides when frames come */
  gst_base_src_set_do_timestamp(GST_BASE_SRC(self), TRUE);
}

static void safelight_src_class_init(SafelightSrcClass *class) {
  const GParamFlags flags = G_PARAM_READWRITE | G_PARAM_STATIC_STRINGS | GST_PARAM_MUTABLE_READY;
  GObjectClass *object = G_OBJECT_CLASS(class);
  GstElementClass *element = GST_ELEMENT_CLASS(class);
  GstBaseSrcClass *base = GST_BASE_SRC_CLASS(class);
  object->set_property = set_property;
  object->get_property = get_property;
  object->finalize = finalize;
#define TEXT(id, name, blurb, standard) \
  g_object_class_install_property(object, id, g_param_spec_string(name, NULL, blurb, standard, flags))
#define NUMBER(id, name, blurb, least, most, standard) \
  g_object_class_install_property(object, id, g_param_spec_int(name, NULL, blurb, least, most, standard, flags))
  TEXT(PROP_SERVER, "server", "HOST:PORT of the server; several replicas are separated by commas", "127.0.0.1:8421");
  TEXT(PROP_PROMPT, "prompt", "What the picture shows", NULL);
  TEXT(PROP_NEGATIVE_PROMPT, "negative-prompt", "What guidance leads away from", NULL);
  TEXT(PROP_MODEL, "model", "models/NAME; the server's default where it is empty", NULL);
  TEXT(PROP_CA_FILE, "ca-file", "PEM file of the certificate authorities to trust; enables TLS", NULL);
  TEXT(PROP_SERVER_NAME, "server-name", "The name in the server's certificate, where it differs from the host", NULL);
  g_object_class_install_property(
      object, PROP_API_KEY,
      g_param_spec_string("api-key", NULL, "Key for the server", NULL,
                          G_PARAM_WRITABLE | G_PARAM_STATIC_STRINGS | GST_PARAM_MUTABLE_READY));
  NUMBER(PROP_WIDTH, "width", "Width in pixels; 0: the model's default", 0, G_MAXINT, 0);
  NUMBER(PROP_HEIGHT, "height", "Height in pixels; 0: the model's default", 0, G_MAXINT, 0);
  NUMBER(PROP_STEPS, "steps", "Denoising steps; 0: the model's default", 0, G_MAXINT, 0);
  NUMBER(PROP_EVERY_N_STEPS, "every-n-steps", "A frame after every n-th step", 1, G_MAXINT, 1);
  g_object_class_install_property(object, PROP_GUIDANCE_SCALE,
                                  g_param_spec_double("guidance-scale", NULL,
                                                      "Classifier-free guidance; -1: the model's default", -1, 1000, -1,
                                                      flags));
  g_object_class_install_property(
      object, PROP_TIMEOUT,
      g_param_spec_double("timeout", NULL, "Deadline in seconds; 0: none", 0, 1e6, 0, flags));
  g_object_class_install_property(
      object, PROP_SEED,
      g_param_spec_int64("seed", NULL, "Seed of the noise; -1: random", -1, G_MAXINT64, -1, flags));
  gst_element_class_add_static_pad_template(element, &src_template);
  gst_element_class_set_static_metadata(element, "Safelight source", "Source/Video/Network",
                                        "Shows a picture while a Safelight server develops it", "Safelight");
  base->start = start;
  base->stop = stop;
  base->unlock = unlock;
  base->unlock_stop = unlock_stop;
  base->is_seekable = is_seekable;
  GST_PUSH_SRC_CLASS(class)->create = create;
  GST_DEBUG_CATEGORY_INIT(safelight_src_debug, "safelightsrc", 0, "Safelight source");
}

static gboolean plugin_init(GstPlugin *plugin) {
  return gst_element_register(plugin, "safelightsrc", GST_RANK_NONE, SAFELIGHT_TYPE_SRC);
}

#define PACKAGE "safelight"
/* The licence is Apache-2.0, which is not in GStreamer's list of licence names. */
GST_PLUGIN_DEFINE(GST_VERSION_MAJOR, GST_VERSION_MINOR, safelight, "Pictures from a Safelight server", plugin_init,
                  SAFELIGHT_VERSION, GST_LICENSE_UNKNOWN, "safelight", "https://github.com/safelight/safelight")
