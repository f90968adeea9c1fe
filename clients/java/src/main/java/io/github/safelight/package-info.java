/**
 * Asks a Safelight server for pictures and watches them develop: previews from the first denoising step on, then the
 * picture, over one stream that survives lost connections and servers.
 *
 * <p>{@link io.github.safelight.SafelightClient} is where to begin. The messages are those of the contract, generated
 * into {@code io.github.safelight.v1}.
 */
@NullMarked
package io.github.safelight;

import org.jspecify.annotations.NullMarked;
