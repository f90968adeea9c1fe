/*
 * C client of a Safelight server: text to image, with previews while the picture is computed.
 *
 * For programs that can call C: engines, plug-ins and other languages. All types are opaque. The library has no
 * callbacks and throws no exceptions. Several threads may use a handle, but freeing it must be its last use.
 * Texts are UTF-8 and end with a zero byte. A text or an image belongs to the handle that returned it and lives as long,
 * unless its function says that it is the caller's.
 *
 * A function that can fail has a last argument `error`, which may be NULL. If it fails, it returns NULL and sets `*error`,
 * which is the caller's: free it with safelight_error_free().
 */
#ifndef SAFELIGHT_H
#define SAFELIGHT_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define SAFELIGHT_API __attribute__((visibility("default")))
#else
#define SAFELIGHT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this header. New functions raise the minor version (the lower 16 bits); changed or removed ones raise
 * the major version (the upper 16 bits). A library works with a program of the same major and no later minor version. */
#define SAFELIGHT_ABI_VERSION 0x00010002u

/* The version that the library was built with. */
SAFELIGHT_API uint32_t safelight_abi_version(void);

/* ---- Errors ---- */

typedef struct safelight_error safelight_error;

/* The gRPC status code, such as 3 (INVALID_ARGUMENT); never 0. Arguments that the library itself refuses are 3 too. */
SAFELIGHT_API int32_t safelight_error_code(const safelight_error *error);
/* The code's name, such as "INVALID_ARGUMENT". */
SAFELIGHT_API const char *safelight_error_code_name(const safelight_error *error);
/* A stable name for programs, such as "QUEUE_FULL"; "" where there is none. */
SAFELIGHT_API const char *safelight_error_reason(const safelight_error *error);
/* A description for people. */
SAFELIGHT_API const char *safelight_error_message(const safelight_error *error);
/* Seconds after which to retry; -1 where the server named none. */
SAFELIGHT_API double safelight_error_retry_after_s(const safelight_error *error);
/* What to change in an invalid request: for each violation, the path of a field and a description. "" beyond the last. */
SAFELIGHT_API int32_t safelight_error_num_violations(const safelight_error *error);
SAFELIGHT_API const char *safelight_error_violation_field(const safelight_error *error, int32_t index);
SAFELIGHT_API const char *safelight_error_violation_description(const safelight_error *error, int32_t index);
SAFELIGHT_API void safelight_error_free(safelight_error *error);

/* ---- Options of a client; each has a default ---- */

typedef struct safelight_options safelight_options;

SAFELIGHT_API safelight_options *safelight_options_new(void);
/* Sent as a bearer token. Visible ASCII characters. */
SAFELIGHT_API void safelight_options_set_api_key(safelight_options *options, const char *api_key);
/* Uses TLS. `ca_pem`: the certificate authorities to trust, as PEM; NULL or "": those of the system. `server_name`: the
 * name in the server's certificate, if it is not the target's host; NULL or "": it is. */
SAFELIGHT_API void safelight_options_set_tls(safelight_options *options, const char *ca_pem, const char *server_name);
/* The client's own certificate and key, as PEM, for a server that asks for them. Only with TLS. */
SAFELIGHT_API void safelight_options_set_certificate(safelight_options *options, const char *certificate_pem,
                                                     const char *key_pem);
/* How long the client tries to resume a generation after a lost connection, counted from its last event: 60 s. */
SAFELIGHT_API void safelight_options_set_patience_s(safelight_options *options, double patience_s);
/* How often a request is sent again if its refusal says after which time to retry: 3. */
SAFELIGHT_API void safelight_options_set_retries(safelight_options *options, int32_t retries);
/* The largest message that is received, in bytes: 4 MiB. A larger one is the error RESOURCE_EXHAUSTED. */
SAFELIGHT_API void safelight_options_set_max_message_bytes(safelight_options *options, int32_t num_bytes);
SAFELIGHT_API void safelight_options_free(safelight_options *options);

/* ---- Client ---- */

typedef struct safelight_client safelight_client;

/* A connection to "host:port". Several replicas are separated by commas; if one fails, the next one is used.
 * Nothing is connected before the first request. `options` may be NULL, and may be freed afterwards. */
SAFELIGHT_API safelight_client *safelight_client_new(const char *target, const safelight_options *options,
                                                     safelight_error **error);
/* Frees the client. Its generations continue. */
SAFELIGHT_API void safelight_client_free(safelight_client *client);

/* List the server's models; get the present state of a generation; cancel one and get its final state, with the step that
 * each output had reached. They return ListModelsResponse or Generation of the API as JSON, and wait for the server.
 * The text is the caller's, to be freed with safelight_text_free(). */
SAFELIGHT_API char *safelight_client_models(safelight_client *client, safelight_error **error);
SAFELIGHT_API char *safelight_client_get(safelight_client *client, const char *generation, safelight_error **error);
SAFELIGHT_API char *safelight_client_cancel(safelight_client *client, const char *generation, safelight_error **error);
SAFELIGHT_API void safelight_text_free(char *text);

/* Sends a picture to start from: the bytes of a PNG, JPEG or WebP file. Returns its name, "images/SHA256", for
 * safelight_request_set_init_image(); the server keeps it for a while. Waits for the server. The text is the caller's, as
 * above. Since 1.1. */
SAFELIGHT_API char *safelight_client_upload_image(safelight_client *client, const uint8_t *data, size_t num_bytes,
                                                  safelight_error **error);

/* ---- Request ---- */

typedef struct safelight_request safelight_request;

/* A request for one picture with the model's defaults. Previews and picture are raw RGBA8, so that they can be copied into
 * a texture. */
SAFELIGHT_API safelight_request *safelight_request_new(const char *prompt);
/* A GenerateRequest of the API as JSON: {"spec": {"prompt": "a red potion"}}. Nothing is added to it. */
SAFELIGHT_API safelight_request *safelight_request_from_json(const char *json, safelight_error **error);
/* "models/NAME"; "" or NULL: the server's default. */
SAFELIGHT_API void safelight_request_set_model(safelight_request *request, const char *model);
SAFELIGHT_API void safelight_request_set_negative_prompt(safelight_request *request, const char *prompt);
SAFELIGHT_API void safelight_request_set_size(safelight_request *request, int32_t width_px, int32_t height_px);
SAFELIGHT_API void safelight_request_set_num_inference_steps(safelight_request *request, int32_t steps);
SAFELIGHT_API void safelight_request_set_guidance_scale(safelight_request *request, double scale);
/* A picture to start from: the name of one that was uploaded, or "generations/ID/outputs/INDEX", the picture of another
 * generation. Since 1.1, as the next two. */
SAFELIGHT_API void safelight_request_set_init_image(safelight_request *request, const char *image);
/* How far the picture may depart from the init image, above 0 and at most 1. Default: 0.8. */
SAFELIGHT_API void safelight_request_set_strength(safelight_request *request, double strength);
/* The mask, named like the init image: white (or, with an alpha channel, transparent) parts are developed anew. */
SAFELIGHT_API void safelight_request_set_mask(safelight_request *request, const char *image);
/* Applies guidance in some of the steps only, as shares of all steps: 0.2 to 0.8. Steps outside cost half. Since 1.2, as
 * the next two. */
SAFELIGHT_API void safelight_request_set_guidance_interval(safelight_request *request, double start, double end);
/* How much of the contrast that guidance adds is taken back, from 0 to 1. */
SAFELIGHT_API void safelight_request_set_guidance_rescale(safelight_request *request, double rescale);
/* How far the server may lower the quality under load; 0 forbids each of the three. `min_num_steps`: the denoising steps to
 * use then. `cheaper_previews`: previews may be made by a cheaper method. `min_similarity`, at most 1: a finished picture
 * of at least this similarity may be served instead. */
SAFELIGHT_API void safelight_request_set_quality_floor(safelight_request *request, int32_t min_num_steps,
                                                       int32_t cheaper_previews, double min_similarity);
/* Adds a picture with this seed. */
SAFELIGHT_API void safelight_request_add_output(safelight_request *request, uint64_t seed);
/* The longest edge of previews in pixels; larger previews are scaled down. */
SAFELIGHT_API void safelight_request_set_preview_max_edge(safelight_request *request, int32_t max_edge_px);
/* Sends a preview after every n-th step. */
SAFELIGHT_API void safelight_request_set_preview_every_n_steps(safelight_request *request, int32_t n);
/* The encoding of the picture, such as "image/png". */
SAFELIGHT_API void safelight_request_set_picture_media_type(safelight_request *request, const char *media_type);
SAFELIGHT_API void safelight_request_free(safelight_request *request);

/* ---- Generation ---- */

typedef struct safelight_generation safelight_generation;

typedef enum safelight_state {
  SAFELIGHT_STATE_ASKED = 0,     /* The server has not answered yet. */
  SAFELIGHT_STATE_ACCEPTED = 1,  /* It was admitted: it is queued or being computed. */
  SAFELIGHT_STATE_SUCCEEDED = 2, /* All pictures have been received. */
  SAFELIGHT_STATE_FAILED = 3,    /* safelight_generation_error() says why; CANCELLED (1) is one of the codes. */
  SAFELIGHT_STATE_CLOSED = 4     /* safelight_generation_close() was called before its end. */
} safelight_state;

/* Starts a generation; returns at once. A thread of the library receives it and keeps the newest preview of each
 * output, and all pictures. `timeout_s`: its deadline, over all connections; 0: none. The request may be freed. */
SAFELIGHT_API safelight_generation *safelight_generate(safelight_client *client, const safelight_request *request,
                                                       double timeout_s, safelight_error **error);
/* Watches an existing generation, "generations/ID". Of `request` only the preview options are used; NULL: no previews. */
SAFELIGHT_API safelight_generation *safelight_watch(safelight_client *client, const char *generation,
                                                    const safelight_request *request, double timeout_s,
                                                    safelight_error **error);

SAFELIGHT_API safelight_state safelight_generation_state(const safelight_generation *generation);
/* Waits until the generation has ended, for at most `timeout_s`; negative: without a limit. Returns its state. */
SAFELIGHT_API safelight_state safelight_generation_wait(safelight_generation *generation, double timeout_s);
/* Its name, "generations/ID"; "" before it was accepted. */
SAFELIGHT_API const char *safelight_generation_name(const safelight_generation *generation);
/* Sets the size of its pictures and returns 1; returns 0 before it was accepted. */
SAFELIGHT_API int32_t safelight_generation_size(const safelight_generation *generation, int32_t *width_px,
                                                int32_t *height_px);
/* Why it failed; NULL while it has not. */
SAFELIGHT_API const safelight_error *safelight_generation_error(const safelight_generation *generation);
/* Returns how many steps an output has made and sets `num_steps`, which may be NULL, to the steps in all. */
SAFELIGHT_API int32_t safelight_generation_step(const safelight_generation *generation, int32_t output_index,
                                                int32_t *num_steps);

/* Asks the server to stop it and waits for the answer, as safelight_client_cancel() does. If it was not accepted yet, this
 * returns NULL and an error; safelight_generation_close() is then enough. */
SAFELIGHT_API char *safelight_generation_cancel(safelight_generation *generation, safelight_error **error);
/* Stops watching: the server suspends the generation, and cancels it after its grace period. Does not wait. */
SAFELIGHT_API void safelight_generation_close(safelight_generation *generation);
/* Closes the generation, and frees it with everything that belongs to it. */
SAFELIGHT_API void safelight_generation_free(safelight_generation *generation);

/* Copies the newest image of an output into the caller's buffer: a preview, or at the end the picture. It never waits, so
 * it can be called in a game loop.
 *
 * `pixels`: gets RGBA8, sRGB, straight alpha. `row_pitch`: bytes from one row to the next; 0: four times the width. `flip`:
 * if not 0, the lowest row comes first. `num_bytes`: size of the buffer. `width_px`, `height_px` and `step` are set to
 * those of the image; `step` is 0 for the picture. Each of them may be NULL.
 *
 * Returns SAFELIGHT_COPIED; SAFELIGHT_NOTHING_NEW if this function has copied the newest image before or there is none;
 * SAFELIGHT_TOO_SMALL if the buffer or the pitch is too small for the image, which can still be copied; or
 * SAFELIGHT_NOT_RAW if the image has another encoding. A preview may be smaller than the picture; the rest of the buffer
 * is then left as it is. */
enum { SAFELIGHT_NOTHING_NEW = 0, SAFELIGHT_COPIED = 1, SAFELIGHT_TOO_SMALL = -1, SAFELIGHT_NOT_RAW = -2 };
SAFELIGHT_API int32_t safelight_generation_poll_rgba8(safelight_generation *generation, int32_t output_index,
                                                      void *pixels, size_t num_bytes, size_t row_pitch, int32_t flip,
                                                      int32_t *width_px, int32_t *height_px, int32_t *step);

/* As the function above, but scales the image (bilinearly) to the given size, since previews may be smaller than the
 * picture. */
SAFELIGHT_API int32_t safelight_generation_poll_scaled_rgba8(safelight_generation *generation, int32_t output_index,
                                                             void *pixels, size_t num_bytes, size_t row_pitch,
                                                             int32_t flip, int32_t width_px, int32_t height_px,
                                                             int32_t *step);

/* ---- Images ---- */

typedef struct safelight_image safelight_image;

/* The finished picture of an output; NULL before. Its SHA-256 has been checked. */
SAFELIGHT_API const safelight_image *safelight_generation_picture(const safelight_generation *generation,
                                                                  int32_t output_index);
SAFELIGHT_API const char *safelight_image_media_type(const safelight_image *image);
SAFELIGHT_API int32_t safelight_image_width_px(const safelight_image *image);
SAFELIGHT_API int32_t safelight_image_height_px(const safelight_image *image);
/* Bytes from one row to the next for raw pixels, else 0. */
SAFELIGHT_API int32_t safelight_image_stride_bytes(const safelight_image *image);
/* 1 if the first of the raw rows is the lowest one. */
SAFELIGHT_API int32_t safelight_image_bottom_up(const safelight_image *image);
/* The encoded bytes. */
SAFELIGHT_API const uint8_t *safelight_image_data(const safelight_image *image, size_t *num_bytes);
/* The seed of a picture. */
SAFELIGHT_API uint64_t safelight_image_seed(const safelight_image *image);
/* Copies raw pixels; arguments and results as for safelight_generation_poll_rgba8(). */
SAFELIGHT_API int32_t safelight_image_copy_rgba8(const safelight_image *image, void *pixels, size_t num_bytes,
                                                 size_t row_pitch, int32_t flip);
/* As the function above, but scales the image to the given size. */
SAFELIGHT_API int32_t safelight_image_scale_rgba8(const safelight_image *image, void *pixels, size_t num_bytes,
                                                  size_t row_pitch, int32_t flip, int32_t width_px, int32_t height_px);

/* ---- Events: for programs that need everything that happens, in order ---- */

typedef struct safelight_event safelight_event;

typedef enum safelight_event_kind {
  SAFELIGHT_EVENT_ACCEPTED = 1,
  SAFELIGHT_EVENT_PROGRESS = 2,
  SAFELIGHT_EVENT_PREVIEW = 3,
  SAFELIGHT_EVENT_PICTURE = 4,
  SAFELIGHT_EVENT_FINISHED = 5
} safelight_event_kind;

/* Returns the next event, which is the caller's. Waits for at most `timeout_s`; negative: without a limit; 0: not at all.
 * NULL if none came in time, and after the end; safelight_generation_state() tells which. If progress and previews are
 * not taken in time, only the newest of each output is kept. Independent of safelight_generation_poll_rgba8(). */
SAFELIGHT_API safelight_event *safelight_generation_next(safelight_generation *generation, double timeout_s);
SAFELIGHT_API safelight_event_kind safelight_event_get_kind(const safelight_event *event);
/* For PROGRESS, PREVIEW and PICTURE: the index of the output; else 0. */
SAFELIGHT_API int32_t safelight_event_output_index(const safelight_event *event);
/* For PROGRESS and PREVIEW: the steps made; else 0. */
SAFELIGHT_API int32_t safelight_event_step(const safelight_event *event);
/* For PROGRESS: the steps in all; else 0. */
SAFELIGHT_API int32_t safelight_event_num_steps(const safelight_event *event);
/* For PREVIEW: number of previews skipped since the previous one, by the server and here; else 0. */
SAFELIGHT_API int32_t safelight_event_num_dropped(const safelight_event *event);
/* For PREVIEW and PICTURE: the image; else NULL. */
SAFELIGHT_API const safelight_image *safelight_event_image(const safelight_event *event);
/* For ACCEPTED and FINISHED: the message of the API as JSON; else "". */
SAFELIGHT_API const char *safelight_event_json(const safelight_event *event);
SAFELIGHT_API void safelight_event_free(safelight_event *event);

#ifdef __cplusplus
}
#endif

#endif
