package safelight

import (
	"bytes"
	"crypto/sha256"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/safelight/safelight/clients/go/safelightv1"
)

// received keeps what was received of a generation so far, over all connections.
type received struct {
	at        int // index of the server that the generation uses
	preview   *pb.PreviewPolicy
	name      string
	numEvents int
	finished  bool
	durable   bool
	sequence  uint64
	seeds     []uint64
	parts     map[int32][]byte
}

// watch is the request that continues where the last connection ended.
func (r *received) watch() *pb.WatchGenerationRequest {
	request := &pb.WatchGenerationRequest{Name: r.name, AfterSequence: r.sequence, Preview: r.preview}
	for index, part := range r.parts {
		offset := &pb.ArtifactOffset{OutputIndex: index, Offset: int64(len(part))}
		request.ArtifactOffsets = append(request.ArtifactOffsets, offset)
	}
	return request
}

// take returns the event that a message is for the caller; nil for a piece of a picture and for details of the protocol.
func (r *received) take(message *pb.GenerationEvent) (Event, error) {
	r.name = message.GetGeneration()
	r.numEvents++
	r.sequence = max(r.sequence, message.GetSequence())
	switch event := message.GetEvent().(type) {
	case *pb.GenerationEvent_Accepted:
		r.seeds = nil
		for _, output := range event.Accepted.GetSpec().GetOutputs() {
			r.seeds = append(r.seeds, output.GetSeed())
		}
		r.durable = event.Accepted.GetDurability() == pb.Accepted_DURABILITY_REPLICATED
		return &Accepted{r.name, event.Accepted}, nil
	case *pb.GenerationEvent_Progress:
		return &Progress{event.Progress}, nil
	case *pb.GenerationEvent_Preview:
		return &Preview{event.Preview}, nil
	case *pb.GenerationEvent_ArtifactChunk:
		return r.artifact(event.ArtifactChunk)
	case *pb.GenerationEvent_Finished:
		r.finished = true
		if event.Finished.GetStatus().GetCode() == 0 {
			return &Finished{r.name, event.Finished}, nil
		}
	}
	return nil, nil
}

func (r *received) artifact(chunk *pb.ArtifactChunk) (Event, error) {
	index := chunk.GetOutputIndex()
	part := r.parts[index]
	if chunk.GetOffset() != int64(len(part)) {
		return nil, nil
	}
	part = append(part, chunk.GetData()...)
	if r.parts == nil {
		r.parts = map[int32][]byte{}
	}
	r.parts[index] = part
	if int64(len(part)) < chunk.GetTotalBytes() || len(chunk.GetSha256()) == 0 {
		return nil, nil
	}
	if sum := sha256.Sum256(part); !bytes.Equal(sum[:], chunk.GetSha256()) {
		return nil, newError(status.Errorf(codes.DataLoss, "output %d arrived damaged", index))
	}
	picture := &Picture{
		OutputIndex: int(index),
		MediaType:   chunk.GetMediaType(),
		WidthPx:     int(chunk.GetWidthPx()),
		HeightPx:    int(chunk.GetHeightPx()),
		StrideBytes: int(chunk.GetStrideBytes()),
		Data:        part,
	}
	if int(index) < len(r.seeds) {
		picture.Seed = r.seeds[index]
	}
	return picture, nil
}
