// Package safelight asks a Safelight server for pictures and watches them develop: previews from the first denoising
// step on, then the picture, over one stream that survives lost connections and servers.
//
// The messages are those of the contract, generated in the package safelightv1.
package safelight

//go:generate make -C ../.. generate
