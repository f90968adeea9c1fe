/*
 * A sprite sheet in a window: a game loop that draws in each frame the newest previews of several generations.
 *
 *   sprite_sheet [HOST:PORT]
 *
 * Each sprite is a generation. Its newest preview is copied into its place in one sheet, with the sheet's row pitch; only
 * sprites that have changed are uploaded. Prints a line when all are finished. Escape or closing the window ends the
 * program, and with it the running generations.
 */
#include <SDL.h>
#include <safelight.h>

#include <stdio.h>
#include <stdlib.h>

enum { SPRITE = 128, COLUMNS = 4, ROWS = 2, NUM_SPRITES = COLUMNS * ROWS, PITCH = 4 * SPRITE * COLUMNS };

static const char *const prompts[NUM_SPRITES] = {
    "a red potion",  "a blue potion",       "a golden key on a blue background", "a green gem",
    "a silver coin", "a purple mushroom",   "a wooden shield",                   "a yellow star",
};

static unsigned char sheet[PITCH * SPRITE * ROWS];

static int fail(const char *what, const char *why) {
  fprintf(stderr, "%s: %s\n", what, why);
  return 1;
}

/* Copies the newest image of a sprite to its place in the sheet and to the texture. Returns whether there was a newer one. */
static int update(SDL_Texture *texture, safelight_generation *generation, int index) {
  const SDL_Rect place = {index % COLUMNS * SPRITE, index / COLUMNS * SPRITE, SPRITE, SPRITE};
  const size_t begin = (size_t)place.y * PITCH + 4 * (size_t)place.x;
  if (safelight_generation_poll_scaled_rgba8(generation, 0, sheet + begin, sizeof sheet - begin, PITCH, 0, SPRITE, SPRITE,
                                             NULL) != SAFELIGHT_COPIED) {
    return 0;
  }
  SDL_UpdateTexture(texture, &place, sheet + begin, PITCH);
  return 1;
}

static int is_quit(const SDL_Event *event) {
  return event->type == SDL_QUIT || (event->type == SDL_KEYDOWN && event->key.keysym.sym == SDLK_ESCAPE);
}

int main(int argc, char **argv) {
  safelight_generation *sprites[NUM_SPRITES] = {NULL};
  safelight_error *error = NULL;
  safelight_client *client = safelight_client_new(argc > 1 ? argv[1] : "127.0.0.1:8421", NULL, &error);
  SDL_Window *window;
  SDL_Renderer *renderer;
  SDL_Texture *texture;
  int i, status = 0, running = 1, finished = 0;
  if (!client) return fail("safelight", safelight_error_message(error));
  if (SDL_Init(SDL_INIT_VIDEO) != 0) return fail("SDL", SDL_GetError());
  window = SDL_CreateWindow("Safelight", 0, 0, COLUMNS * SPRITE, ROWS * SPRITE, 0);
  renderer = window ? SDL_CreateRenderer(window, -1, 0) : NULL;
  texture = renderer ? SDL_CreateTexture(renderer, SDL_PIXELFORMAT_RGBA32, SDL_TEXTUREACCESS_STREAMING, COLUMNS * SPRITE,
                                         ROWS * SPRITE)
                     : NULL;
  if (!texture) return fail("SDL", SDL_GetError());
  SDL_UpdateTexture(texture, NULL, sheet, PITCH);
  for (i = 0; i < NUM_SPRITES; ++i) {
    safelight_request *request = safelight_request_new(prompts[i]);
    safelight_request_set_size(request, SPRITE, SPRITE);
    safelight_request_add_output(request, (uint64_t)i); /* fixed seeds: the same sheet each time */
    sprites[i] = safelight_generate(client, request, 0, NULL);
    safelight_request_free(request);
  }
  while (running) {
    SDL_Event event;
    int num_ended = 0, changed = 0;
    for (i = 0; i < NUM_SPRITES; ++i) {
      /* Read before the poll: the picture of a generation that ends in between is drawn in the next frame. */
      num_ended += safelight_generation_state(sprites[i]) >= SAFELIGHT_STATE_SUCCEEDED;
      changed += update(texture, sprites[i], i);
    }
    SDL_RenderCopy(renderer, texture, NULL, NULL);
    SDL_RenderPresent(renderer);
    if (num_ended == NUM_SPRITES && !changed && !finished) {
      finished = 1;
      for (i = 0; i < NUM_SPRITES; ++i) {
        const safelight_error *failure = safelight_generation_error(sprites[i]);
        if (failure) status = fail(prompts[i], safelight_error_message(failure));
      }
      printf("%d sprites\n", NUM_SPRITES);
      fflush(stdout);
    }
    while (SDL_PollEvent(&event)) running &= !is_quit(&event);
    SDL_Delay(16);
  }
  for (i = 0; i < NUM_SPRITES; ++i) safelight_generation_free(sprites[i]);
  safelight_client_free(client);
  SDL_DestroyTexture(texture);
  SDL_DestroyRenderer(renderer);
  SDL_DestroyWindow(window);
  SDL_Quit();
  return status;
}
