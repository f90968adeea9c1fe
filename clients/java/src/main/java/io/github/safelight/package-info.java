/**
 * A client of Safelight servers. It requests pictures and receives previews from the first denoising step on, then the
 * pictures, over one stream that survives the loss of connections and servers.
 *
 * <p>Start with {@link io.github.safelight.SafelightClient}. {@code io.github.safelight.v1} has the generated messages of
 * the API.
 */
@NullMarked
package io.github.safelight;

import org.jspecify.annotations.NullMarked;
