package safelight

import (
	pb "github.com/safelight/safelight/clients/go/safelightv1"
)

// An Event is something that happened to a generation: [*Accepted], [*Progress], [*Preview], [*Picture] or [*Finished].
type Event interface{ event() }

// Accepted is the first event: the request was admitted.
type Accepted struct {
	// Generation is the name of the generation, "generations/ID", for Watch and Cancel.
	Generation string
	*pb.Accepted
}

// Progress says that an output has made a denoising step.
type Progress struct{ *pb.Progress }

// Preview is how an output looks after a step, encoded as its MediaType says.
type Preview struct{ *pb.Preview }

// Picture is a finished picture. Its SHA-256 has been checked.
type Picture struct {
	OutputIndex int
	MediaType   string
	WidthPx     int
	HeightPx    int
	// StrideBytes is the number of bytes from one row to the next for raw pixels, else 0.
	StrideBytes int
	Seed        uint64
	Data        []byte
}

// Finished is the last event: the generation has succeeded.
type Finished struct {
	Generation string
	*pb.Finished
}

func (*Accepted) event() {}
func (*Progress) event() {}
func (*Preview) event()  {}
func (*Picture) event()  {}
func (*Finished) event() {}
