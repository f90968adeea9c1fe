// The runner of the Go client: reads cases, runs them, and prints the outcomes, a JSON object a line each.
//
// See clients/CONFORMANCE.md.
package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"log"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	safelight "github.com/safelight/safelight/clients/go"
	pb "github.com/safelight/safelight/clients/go/safelightv1"
)

type conformanceCase struct {
	Name         string            `json:"name"`
	Targets      []string          `json:"targets"`
	CAFile       string            `json:"ca_file"`
	CertFile     string            `json:"cert_file"`
	KeyFile      string            `json:"key_file"`
	ServerName   string            `json:"server_name"`
	APIKey       string            `json:"api_key"`
	Requests     []json.RawMessage `json:"requests"`
	TimeoutS     float64           `json:"timeout_s"`
	PatienceS    float64           `json:"patience_s"`
	Retries      int               `json:"retries"`
	MaxBytes     int               `json:"max_message_bytes"`
	PauseS       float64           `json:"pause_s"`
	CancelAtStep int32             `json:"cancel_at_step"`
	WatchAgain   bool              `json:"watch_again"`
	InitFile     string            `json:"init_image_file"`
	MaskFile     string            `json:"mask_file"`
	Interval     []float32         `json:"guidance_interval"`
	Rescale      float32           `json:"guidance_rescale"`
	MinNumSteps  int32             `json:"min_num_steps"`
	Measure      bool              `json:"measure"`
}

type report struct {
	Case        string        `json:"case"`
	Generations []*generation `json:"generations"`
}

type generation struct {
	Code        string            `json:"code"`
	Reason      string            `json:"reason"`
	Violations  map[string]string `json:"violations"`
	RetryAfterS *float64          `json:"retry_after_s"`
	Message     string            `json:"message"`
	Generation  string            `json:"generation"`
	Reliable    []string          `json:"reliable"`
	Steps       [][2]int32        `json:"steps"`
	Previews    []image           `json:"previews"`
	Pictures    []image           `json:"pictures"`
	NumSteps    int64             `json:"num_steps"`
	Cancelled   *cancelled        `json:"cancelled"`
	Watched     *watched          `json:"watched"`
	ReceivedUs  []int64           `json:"received_us"`
}

type image struct {
	OutputIndex int    `json:"output_index"`
	MediaType   string `json:"media_type"`
	WidthPx     int    `json:"width_px"`
	HeightPx    int    `json:"height_px"`
	StrideBytes int    `json:"stride_bytes"`
	Step        int    `json:"step"`
	NumBytes    int    `json:"num_bytes"`
	NumDropped  int    `json:"num_dropped"`
	Seed        string `json:"seed"`
	SHA256      string `json:"sha256"`
}

type cancelled struct {
	State string  `json:"state"`
	Steps []int32 `json:"steps"`
}

type watched struct {
	Reliable []string `json:"reliable"`
	SHA256   []string `json:"sha256"`
	State    string   `json:"state"`
	Models   []string `json:"models"`
}

func main() {
	cases := json.NewDecoder(os.Stdin)
	for {
		var given conformanceCase
		err := cases.Decode(&given)
		if err == io.EOF {
			return
		}
		check(err)
		check(json.NewEncoder(os.Stdout).Encode(run(given)))
	}
}

func run(given conformanceCase) report {
	options := []safelight.Option{
		safelight.WithAPIKey(given.APIKey),
		safelight.WithPatience(seconds(given.PatienceS)),
		safelight.WithRetries(given.Retries),
	}
	if given.CAFile != "" {
		options = append(options, safelight.WithTransportCredentials(credentials.NewTLS(tlsConfig(given))))
	}
	if given.MaxBytes > 0 {
		limit := grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(given.MaxBytes))
		options = append(options, safelight.WithDialOptions(limit))
	}
	client, err := safelight.NewClient(strings.Join(given.Targets, ","), options...)
	check(err)
	defer client.Close()
	all := report{given.Name, make([]*generation, len(given.Requests))}
	var group sync.WaitGroup
	for index, raw := range given.Requests {
		group.Add(1)
		go func() {
			defer group.Done()
			request := &pb.GenerateRequest{}
			check(protojson.Unmarshal(raw, request))
			all.Generations[index] = generate(client, given, request)
		}()
	}
	group.Wait()
	return all
}

func tlsConfig(given conformanceCase) *tls.Config {
	config := &tls.Config{ServerName: given.ServerName, RootCAs: x509.NewCertPool()}
	authority, err := os.ReadFile(given.CAFile)
	check(err)
	config.RootCAs.AppendCertsFromPEM(authority)
	if given.CertFile != "" {
		pair, err := tls.LoadX509KeyPair(given.CertFile, given.KeyFile)
		check(err)
		config.Certificates = []tls.Certificate{pair}
	}
	return config
}

// upload uploads the picture in a file and returns its name.
func upload(ctx context.Context, client *safelight.Client, file string) string {
	data, err := os.ReadFile(file)
	check(err)
	image, err := client.UploadImage(ctx, data)
	check(err)
	return image.GetName()
}

func generate(client *safelight.Client, given conformanceCase, request *pb.GenerateRequest) *generation {
	ctx := context.Background()
	if given.TimeoutS > 0 {
		timed, cancel := context.WithTimeout(ctx, seconds(given.TimeoutS))
		defer cancel()
		ctx = timed
	}
	seen := &generation{
		Code: "OK", Violations: map[string]string{}, Reliable: []string{}, Steps: [][2]int32{}, Previews: []image{}, Pictures: []image{},
	}
	if given.InitFile != "" {
		request.Spec.InitImage = upload(ctx, client, given.InitFile)
		request.Spec.Mask = upload(ctx, client, given.MaskFile)
	}
	if len(given.Interval) > 0 {
		request.Spec.GuidanceInterval = &pb.GuidanceInterval{Start: &given.Interval[0], End: &given.Interval[1]}
		request.Spec.GuidanceRescale = proto.Float32(given.Rescale)
	}
	if given.MinNumSteps > 0 {
		request.QualityFloor = &pb.QualityFloor{MinNumSteps: proto.Int32(given.MinNumSteps)}
	}
	for event, err := range client.Generate(ctx, request) {
		if err != nil {
			seen.fail(err)
			break
		}
		switch event := event.(type) {
		case *safelight.Accepted:
			seen.Generation = event.Generation
			seen.Reliable = append(seen.Reliable, "accepted")
		case *safelight.Progress:
			seen.Steps = append(seen.Steps, [2]int32{event.GetOutputIndex(), event.GetStep()})
			if given.CancelAtStep > 0 && event.GetStep() >= given.CancelAtStep && seen.Cancelled == nil {
				ended, err := client.Cancel(ctx, seen.Generation)
				check(err)
				seen.Cancelled = &cancelled{State: ended.GetState().String()}
				for _, output := range ended.GetOutputs() {
					seen.Cancelled.Steps = append(seen.Cancelled.Steps, output.GetStep())
				}
			}
		case *safelight.Preview:
			if given.Measure {
				seen.ReceivedUs = append(seen.ReceivedUs, time.Now().UnixMicro())
				continue
			}
			seen.Previews = append(seen.Previews, image{
				OutputIndex: int(event.GetOutputIndex()), MediaType: event.GetMediaType(), WidthPx: int(event.GetWidthPx()),
				HeightPx: int(event.GetHeightPx()), StrideBytes: int(event.GetStrideBytes()), Step: int(event.GetStep()),
				NumBytes: len(event.GetData()), NumDropped: int(event.GetNumDropped()),
			})
			time.Sleep(seconds(given.PauseS))
		case *safelight.Picture:
			sum := sha256.Sum256(event.Data)
			seen.Reliable = append(seen.Reliable, "picture")
			seen.Pictures = append(seen.Pictures, image{
				OutputIndex: event.OutputIndex, MediaType: event.MediaType, WidthPx: event.WidthPx, HeightPx: event.HeightPx,
				StrideBytes: event.StrideBytes, Seed: strconv.FormatUint(event.Seed, 10), SHA256: hex.EncodeToString(sum[:]),
			})
		case *safelight.Finished:
			seen.Reliable = append(seen.Reliable, "finished")
			seen.NumSteps = event.GetUsage().GetNumSteps()
		}
	}
	if given.WatchAgain && seen.Code == "OK" {
		seen.Watched = watchAgain(ctx, client, seen.Generation)
	}
	return seen
}

// watchAgain watches a generation again and returns the events, and what the server reports about it and its models.
func watchAgain(ctx context.Context, client *safelight.Client, name string) *watched {
	again := &watched{}
	sums := map[int]string{}
	for event, err := range client.Watch(ctx, name, &pb.PreviewPolicy{Method: pb.PreviewMethod_PREVIEW_METHOD_NONE}) {
		check(err)
		switch event := event.(type) {
		case *safelight.Accepted:
			again.Reliable = append(again.Reliable, "accepted")
		case *safelight.Picture:
			again.Reliable = append(again.Reliable, "picture")
			sum := sha256.Sum256(event.Data)
			sums[event.OutputIndex] = hex.EncodeToString(sum[:])
		case *safelight.Finished:
			again.Reliable = append(again.Reliable, "finished")
		}
	}
	for index := range len(sums) {
		again.SHA256 = append(again.SHA256, sums[index])
	}
	generation, err := client.Get(ctx, name)
	check(err)
	again.State = generation.GetState().String()
	models, err := client.Models(ctx)
	check(err)
	for _, model := range models {
		again.Models = append(again.Models, model.GetName())
	}
	return again
}

func (seen *generation) fail(err error) {
	var failure *safelight.Error
	if !errors.As(err, &failure) {
		log.Fatal(err)
	}
	seen.Code, seen.Reason, seen.Message = codeName(failure.Code), failure.Reason, failure.Message
	if failure.FieldViolations != nil {
		seen.Violations = failure.FieldViolations
	}
	if failure.Retryable {
		after := failure.RetryAfter.Seconds()
		seen.RetryAfterS = &after
	}
}

// codeName is the name of a code in gRPC's specification, such as "RESOURCE_EXHAUSTED"; Go says ResourceExhausted.
func codeName(code codes.Code) string {
	if code == codes.Canceled {
		return "CANCELLED"
	}
	var name strings.Builder
	for index, letter := range code.String() {
		if index > 0 && letter >= 'A' && letter <= 'Z' {
			name.WriteByte('_')
		}
		name.WriteRune(letter)
	}
	return strings.ToUpper(name.String())
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
