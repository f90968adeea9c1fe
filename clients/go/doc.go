// Package safelight is a client of Safelight servers. It requests pictures and receives previews from the first denoising
// step on, then the pictures, over one stream that survives the loss of connections and servers.
//
// The package safelightv1 has the generated messages of the API.
package safelight

//go:generate make -C ../.. generate
