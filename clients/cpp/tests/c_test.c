/* The test of the C client; tests/clients/test_c_abi.py runs it against a real server: c_test HOST:PORT PIXELS.
 * Writes the rows of the picture, top down, to PIXELS. Exit status 0: all checks have passed. */
#include <safelight.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                        \
  do {                                                                          \
    if (!(condition)) {                                                         \
      fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);   \
      exit(1);                                                                  \
    }                                                                           \
  } while (0)

enum { WIDTH = 128, HEIGHT = 128, PITCH = 1024 };

static safelight_request *request_of(const char *prompt, int32_t steps, uint64_t seed) {
  safelight_request *request = safelight_request_new(prompt);
  CHECK(request);
  safelight_request_set_num_inference_steps(request, steps);
  safelight_request_add_output(request, seed);
  return request;
}

static void test_scaling(const safelight_image *picture) {
  static unsigned char small[4], large[4 * 256 * 256], same[4 * WIDTH * HEIGHT];
  size_t num_bytes, i;
  const unsigned char *pixels = safelight_image_data(picture, &num_bytes);
  CHECK(safelight_image_scale_rgba8(picture, large, sizeof large, 0, 0, 256, 256) == SAFELIGHT_COPIED);
  for (i = 0; i < 4; ++i) { /* scaling keeps the corners */
    CHECK(large[i] == pixels[i]);
    CHECK(large[sizeof large - 4 + i] == pixels[num_bytes - 4 + i]);
    CHECK(abs(large[4 + i] - (3 * pixels[i] + pixels[4 + i]) / 4) <= 1); /* a quarter of the way */
  }
  CHECK(safelight_image_scale_rgba8(picture, same, sizeof same, 0, 0, WIDTH, HEIGHT) == SAFELIGHT_COPIED);
  CHECK(memcmp(same, pixels, sizeof same) == 0);
  CHECK(safelight_image_scale_rgba8(picture, small, sizeof small, 0, 1, 1, 1) == SAFELIGHT_COPIED && small[3] == 255);
  CHECK(safelight_image_scale_rgba8(picture, large, sizeof large, 0, 0, 257, 256) == SAFELIGHT_TOO_SMALL);
  CHECK(safelight_image_scale_rgba8(picture, large, sizeof large, 0, 0, -1, 256) == SAFELIGHT_TOO_SMALL);
}

/* A game loop: it never waits for the server, and has the picture at the end. */
static void test_polling(safelight_client *client, const char *file) {
  static unsigned char texture[PITCH * HEIGHT], flipped[4 * WIDTH * HEIGHT];
  safelight_error *error = NULL;
  safelight_request *request = request_of("a red potion", 40, 7);
  safelight_generation *generation = safelight_generate(client, request, 60, &error);
  int32_t width = 0, height = 0, step = -1, last_step = 0, num_steps = 0, num_previews = 0, row, copied;
  const safelight_image *picture;
  size_t num_bytes;
  FILE *written;
  CHECK(generation && !error);
  safelight_request_free(request);
  memset(texture, 0xEE, sizeof texture);
  for (;;) {
    const int ended = safelight_generation_state(generation) >= SAFELIGHT_STATE_SUCCEEDED;
    copied = safelight_generation_poll_rgba8(generation, 0, texture, sizeof texture, PITCH, 0, &width, &height, &step);
    CHECK(copied >= 0);
    if (copied == SAFELIGHT_COPIED && step > 0) {
      CHECK(step > last_step);
      last_step = step;
      ++num_previews;
    }
    if (ended) break;
    safelight_generation_wait(generation, 0.005);
  }
  CHECK(safelight_generation_state(generation) == SAFELIGHT_STATE_SUCCEEDED);
  CHECK(safelight_generation_error(generation) == NULL);
  CHECK(strncmp(safelight_generation_name(generation), "generations/", 12) == 0);
  CHECK(num_previews > 0 && step == 0 && width == WIDTH && height == HEIGHT);
  CHECK(safelight_generation_step(generation, 0, &num_steps) == 40 && num_steps == 40);
  CHECK(safelight_generation_step(generation, 1, NULL) == 0);
  CHECK(safelight_generation_size(generation, &width, &height) && width == WIDTH && height == HEIGHT);
  CHECK(safelight_generation_poll_rgba8(generation, 0, texture, sizeof texture, 0, 0, NULL, NULL, NULL) ==
        SAFELIGHT_NOTHING_NEW);
  CHECK(texture[4 * WIDTH] == 0xEE && texture[PITCH - 1] == 0xEE); /* between the rows nothing is written */

  picture = safelight_generation_picture(generation, 0);
  CHECK(picture && !safelight_generation_picture(generation, 1));
  CHECK(strcmp(safelight_image_media_type(picture), "application/x-raw-rgba8") == 0);
  CHECK(safelight_image_width_px(picture) == WIDTH && safelight_image_height_px(picture) == HEIGHT);
  CHECK(safelight_image_seed(picture) == 7 && safelight_image_stride_bytes(picture) == 4 * WIDTH);
  CHECK(safelight_image_data(picture, &num_bytes) && num_bytes == 4 * WIDTH * HEIGHT);
  CHECK(safelight_image_copy_rgba8(picture, flipped, sizeof flipped, 0, 1) == SAFELIGHT_COPIED);
  written = fopen(file, "wb");
  CHECK(written);
  for (row = 0; row < HEIGHT; ++row) {
    CHECK(memcmp(texture + row * PITCH, flipped + (HEIGHT - 1 - row) * 4 * WIDTH, 4 * WIDTH) == 0);
    CHECK(fwrite(texture + row * PITCH, 4, WIDTH, written) == WIDTH);
  }
  CHECK(fclose(written) == 0);

  test_scaling(picture);

  /* Buffers and pitches that are too small for it, and pitches whose product overflows. */
  CHECK(safelight_image_copy_rgba8(picture, flipped, sizeof flipped - 1, 0, 0) == SAFELIGHT_TOO_SMALL);
  CHECK(safelight_image_copy_rgba8(picture, flipped, sizeof flipped, 4 * WIDTH - 1, 0) == SAFELIGHT_TOO_SMALL);
  CHECK(safelight_image_copy_rgba8(picture, flipped, sizeof flipped, (size_t)-1 / 4, 0) == SAFELIGHT_TOO_SMALL);
  CHECK(safelight_image_copy_rgba8(picture, NULL, 0, 0, 0) == SAFELIGHT_TOO_SMALL);
  safelight_generation_free(generation);
}

/* All events, in order, of a request in JSON; then the generation is watched a second time. */
static void test_events(safelight_client *client) {
  static const char json[] =
      "{\"spec\": {\"prompt\": \"a red potion\", \"numInferenceSteps\": 6, \"outputs\": [{\"seed\": 8}, {\"seed\": 9}]},"
      " \"encoding\": {\"mediaType\": \"application/x-raw-rgba8\", \"rowOrder\": \"ROW_ORDER_BOTTOM_UP\"}}";
  safelight_error *error = NULL;
  safelight_request *request = safelight_request_from_json(json, &error);
  safelight_generation *generation, *again;
  safelight_event *event;
  int num_events = 0, num_previews = 0, num_pictures = 0, finished = 0;
  CHECK(request && !error);
  generation = safelight_generate(client, request, 0, &error);
  CHECK(generation && !error);
  while ((event = safelight_generation_next(generation, -1)) != NULL) {
    const safelight_image *image = safelight_event_image(event);
    CHECK(!finished);
    switch (safelight_event_get_kind(event)) {
      case SAFELIGHT_EVENT_ACCEPTED:
        CHECK(num_events == 0 && strstr(safelight_event_json(event), "\"numInferenceSteps\":6"));
        break;
      case SAFELIGHT_EVENT_PROGRESS:
        CHECK(safelight_event_step(event) > 0 && safelight_event_num_steps(event) == 6);
        break;
      case SAFELIGHT_EVENT_PREVIEW:
        CHECK(strcmp(safelight_image_media_type(image), "image/jpeg") == 0 && safelight_event_num_dropped(event) >= 0);
        CHECK(safelight_image_copy_rgba8(image, &num_events, sizeof num_events, 0, 0) == SAFELIGHT_NOT_RAW);
        ++num_previews;
        break;
      case SAFELIGHT_EVENT_PICTURE:
        CHECK(image == safelight_generation_picture(generation, safelight_event_output_index(event)));
        CHECK(safelight_image_bottom_up(image) && safelight_image_seed(image) >= 8);
        ++num_pictures;
        break;
      case SAFELIGHT_EVENT_FINISHED:
        finished = strstr(safelight_event_json(event), "\"numSteps\":\"12\"") != NULL;
        break;
    }
    ++num_events;
    safelight_event_free(event);
  }
  CHECK(safelight_generation_state(generation) == SAFELIGHT_STATE_SUCCEEDED);
  CHECK(finished && num_previews > 0 && num_pictures == 2);

  again = safelight_watch(client, safelight_generation_name(generation), NULL, 10, &error);
  CHECK(again && safelight_generation_wait(again, -1) == SAFELIGHT_STATE_SUCCEEDED);
  CHECK(safelight_generation_picture(again, 1));
  safelight_generation_free(again);
  safelight_generation_free(generation);
  safelight_request_free(request);
}

static void test_cancel(safelight_client *client) {
  safelight_error *error = NULL;
  safelight_request *request = request_of("a red potion", 900, 10);
  safelight_generation *generation = safelight_generate(client, request, 0, &error);
  safelight_event *event = safelight_generation_next(generation, -1);
  char *ended, *known;
  CHECK(event && safelight_event_get_kind(event) == SAFELIGHT_EVENT_ACCEPTED);
  safelight_event_free(event);
  ended = safelight_generation_cancel(generation, &error);
  CHECK(ended && !error && strstr(ended, "STATE_CANCELLED"));
  CHECK(safelight_generation_wait(generation, -1) == SAFELIGHT_STATE_FAILED);
  CHECK(safelight_error_code(safelight_generation_error(generation)) == 1);
  CHECK(strcmp(safelight_error_reason(safelight_generation_error(generation)), "GENERATION_CANCELLED") == 0);
  known = safelight_client_get(client, safelight_generation_name(generation), &error);
  CHECK(known && strstr(known, "STATE_CANCELLED"));
  safelight_text_free(known);
  safelight_text_free(ended);
  safelight_generation_free(generation);
  safelight_request_free(request);
}

/* Closing a generation ends a wait at once; it may be freed at any moment, also after its client. */
static void test_leaving(const char *target) {
  safelight_client *client = safelight_client_new(target, NULL, NULL);
  safelight_request *request = request_of("a red potion", 900, 11);
  safelight_generation *one = safelight_generate(client, request, 0, NULL);
  safelight_generation *other = safelight_generate(client, request, 0, NULL);
  safelight_client_free(client);
  CHECK(one && other);
  safelight_generation_close(one);
  CHECK(safelight_generation_wait(one, -1) == SAFELIGHT_STATE_CLOSED);
  while (safelight_generation_state(one) != SAFELIGHT_STATE_CLOSED) {}
  safelight_generation_free(one);
  safelight_generation_free(other);
  safelight_request_free(request);
}

static void test_errors(safelight_client *client) {
  safelight_error *error = NULL;
  safelight_options *options = safelight_options_new();
  safelight_client *nowhere;
  safelight_generation *generation;
  const safelight_error *failure;
  safelight_request *request = request_of("a red potion", 0, 12);
  char *models;

  CHECK(!safelight_client_new("", NULL, &error) && safelight_error_code(error) == 3);
  CHECK(strstr(safelight_error_message(error), "names no server"));
  safelight_error_free(error);
  safelight_options_set_api_key(options, "a key");
  CHECK(!safelight_client_new("127.0.0.1:1", options, &error) && strstr(safelight_error_message(error), "API key"));
  safelight_error_free(error);
  CHECK(!safelight_client_new(NULL, NULL, NULL));
  CHECK(!safelight_request_from_json("{\"spec\": 7}", &error) && safelight_error_code(error) == 3);
  safelight_error_free(error);
  CHECK(!safelight_generate(NULL, request, 0, &error) && !safelight_generate(client, NULL, 0, NULL));
  safelight_error_free(error);
  CHECK(!safelight_client_get(client, "generations/none", &error));
  safelight_error_free(error);

  generation = safelight_generate(client, request, 0, &error);
  CHECK(!error && safelight_generation_wait(generation, -1) == SAFELIGHT_STATE_FAILED);
  failure = safelight_generation_error(generation);
  CHECK(strcmp(safelight_error_code_name(failure), "INVALID_ARGUMENT") == 0);
  CHECK(strcmp(safelight_error_reason(failure), "INVALID_REQUEST") == 0 && safelight_error_num_violations(failure) == 1);
  CHECK(strcmp(safelight_error_violation_field(failure, 0), "spec.num_inference_steps") == 0);
  CHECK(*safelight_error_violation_description(failure, 0) && !*safelight_error_violation_field(failure, 1));
  CHECK(safelight_error_retry_after_s(failure) < 0);
  CHECK(!safelight_generation_next(generation, -1) && !*safelight_generation_name(generation));
  CHECK(!safelight_generation_cancel(generation, &error) && safelight_error_code(error) == 9);
  safelight_error_free(error);
  safelight_generation_free(generation);

  safelight_options_set_api_key(options, NULL);
  safelight_options_set_patience_s(options, 0.2);
  safelight_options_set_retries(options, 0);
  nowhere = safelight_client_new("127.0.0.1:1", options, &error);
  generation = safelight_generate(nowhere, request, 0, &error);
  CHECK(safelight_generation_wait(generation, -1) == SAFELIGHT_STATE_FAILED);
  CHECK(safelight_error_code(safelight_generation_error(generation)) == 14);
  safelight_generation_free(generation);
  safelight_client_free(nowhere);

  models = safelight_client_models(client, &error);
  CHECK(models && !error && strstr(models, "models/simulated"));
  safelight_text_free(models);
  safelight_request_free(request);
  safelight_options_free(options);
  safelight_error_free(NULL);
  safelight_generation_free(NULL);
}

/* A guidance interval and a quality floor; fields that are 0 are left out of the request. */
static void test_arguments(safelight_client *client) {
  safelight_error *error = NULL;
  safelight_request *request = request_of("a red potion", 4, 14);
  safelight_generation *generation;
  safelight_request_set_guidance_scale(request, 4);
  safelight_request_set_guidance_interval(request, 0.25, 0.75);
  safelight_request_set_guidance_rescale(request, 0.5);
  safelight_request_set_quality_floor(request, 2, 1, 0.9);
  generation = safelight_generate(client, request, 60, &error);
  CHECK(!error && safelight_generation_wait(generation, -1) == SAFELIGHT_STATE_SUCCEEDED);
  safelight_generation_free(generation);
  safelight_request_set_quality_floor(request, 5, 0, 0);
  generation = safelight_generate(client, request, 60, &error);
  CHECK(!error && safelight_generation_wait(generation, -1) == SAFELIGHT_STATE_FAILED);
  CHECK(strcmp(safelight_error_violation_field(safelight_generation_error(generation), 0), "quality_floor.min_num_steps") == 0);
  safelight_generation_free(generation);
  safelight_request_free(request);
}

/* Init images: the picture of another generation, and an upload that is not a picture. */
static void test_pictures(safelight_client *client) {
  static const uint8_t no_picture[] = "no picture";
  safelight_error *error = NULL;
  safelight_request *request = request_of("a red potion", 4, 13);
  safelight_generation *first = safelight_generate(client, request, 60, &error), *second;
  char name[128];
  CHECK(!error && safelight_generation_wait(first, -1) == SAFELIGHT_STATE_SUCCEEDED);
  snprintf(name, sizeof name, "%s/outputs/0", safelight_generation_name(first));
  safelight_request_set_init_image(request, name);
  safelight_request_set_mask(request, name);
  safelight_request_set_strength(request, 0.5);
  second = safelight_generate(client, request, 60, &error);
  CHECK(!error && safelight_generation_wait(second, -1) == SAFELIGHT_STATE_SUCCEEDED);
  CHECK(safelight_generation_picture(second, 0));
  CHECK(!safelight_client_upload_image(client, no_picture, sizeof no_picture, &error));
  CHECK(safelight_error_code(error) == 3 && strcmp(safelight_error_violation_field(error, 0), "data") == 0);
  safelight_error_free(error);
  CHECK(!safelight_client_upload_image(client, NULL, 0, NULL));
  safelight_generation_free(second);
  safelight_generation_free(first);
  safelight_request_free(request);
}

int main(int argc, char **argv) {
  safelight_error *error = NULL;
  safelight_client *client;
  CHECK(argc == 3);
  CHECK(safelight_abi_version() == SAFELIGHT_ABI_VERSION);
  client = safelight_client_new(argv[1], NULL, &error);
  CHECK(client && !error);
  test_polling(client, argv[2]);
  test_events(client);
  test_cancel(client);
  test_leaving(argv[1]);
  test_errors(client);
  test_arguments(client);
  test_pictures(client);
  safelight_client_free(client);
  puts("ok");
  return 0;
}
