using System;
using System.Collections.Generic;

namespace Safelight
{
    /// <summary>The steps that have guidance, as shares of all steps: from 0.2 to 0.8.</summary>
    public struct GuidanceInterval
    {
        public GuidanceInterval(double start, double end)
        {
            Start = start;
            End = end;
        }

        public double Start { get; }
        public double End { get; }
    }

    /// <summary>How far the quality of a request may go down under load. Each property allows one thing.</summary>
    public sealed class QualityFloor
    {
        /// <summary>The fewest denoising steps; null: no fewer.</summary>
        public int? MinNumSteps { get; set; }

        /// <summary>Whether previews may come from a cheaper method than the one asked for.</summary>
        public bool CheaperPreviews { get; set; }

        /// <summary>The least similarity of a finished picture that may be served in place of a new one, above 0 and at most 1;
        /// null: none is.</summary>
        public double? MinSimilarity { get; set; }
    }

    /// <summary>
    /// What to generate. What is null is as the model and the server have it. Previews and picture are raw RGBA8, to be
    /// copied into a texture, unless <see cref="PictureMediaType"/> or JSON says otherwise.
    /// </summary>
    public sealed class GenerateRequest
    {
        private readonly string prompt;
        private readonly string json;

        public GenerateRequest(string prompt) : this(prompt, null)
        {
            if (prompt == null) throw new ArgumentNullException(nameof(prompt));
        }

        private GenerateRequest(string prompt, string json)
        {
            this.prompt = prompt;
            this.json = json;
        }

        /// <summary>GenerateRequest of the contract, as JSON; nothing is added to it but what is set here.</summary>
        public static GenerateRequest FromJson(string json) =>
            new GenerateRequest(null, json ?? throw new ArgumentNullException(nameof(json)));

        /// <summary>"models/NAME".</summary>
        public string Model { get; set; }

        public string NegativePrompt { get; set; }

        /// <summary>To be set together with <see cref="HeightPx"/>.</summary>
        public int? WidthPx { get; set; }

        public int? HeightPx { get; set; }
        public int? NumInferenceSteps { get; set; }
        public double? GuidanceScale { get; set; }

        /// <summary>How much of the contrast that guidance adds is taken back, 0 to 1.</summary>
        public double? GuidanceRescale { get; set; }

        /// <summary>Where guidance begins and ends, as shares of the steps. Other steps cost half.</summary>
        public GuidanceInterval? GuidanceInterval { get; set; }

        /// <summary>What may be given up under load; null: nothing.</summary>
        public QualityFloor QualityFloor { get; set; }

        /// <summary>A picture to start from: the name that <see cref="Client.UploadImage"/> gave, or
        /// "generations/ID/outputs/INDEX", the picture of another generation.</summary>
        public string InitImage { get; set; }

        /// <summary>How much of <see cref="InitImage"/> is given up, above 0 and at most 1.</summary>
        public double? Strength { get; set; }

        /// <summary>Which part of <see cref="InitImage"/> is developed anew: white, or transparent if it has an alpha channel.
        /// Named as that.</summary>
        public string Mask { get; set; }

        /// <summary>One picture for each; none: one picture, with a seed of the server's.</summary>
        public IList<ulong> Seeds { get; } = new List<ulong>();

        /// <summary>The longest edge of previews; larger ones are scaled down.</summary>
        public int? PreviewMaxEdgePx { get; set; }

        /// <summary>A preview after every n-th step.</summary>
        public int? PreviewEveryNSteps { get; set; }

        /// <summary>The encoding of the picture, such as "image/png".</summary>
        public string PictureMediaType { get; set; }

        internal RequestHandle ToNative()
        {
            if (WidthPx.HasValue != HeightPx.HasValue) throw new ArgumentException("WidthPx and HeightPx go together");
            RequestHandle request;
            if (json != null)
            {
                request = Native.safelight_request_from_json(Native.Utf8(json), out ErrorHandle error);
                if (request.IsInvalid) throw SafelightException.Take(error);
            }
            else
            {
                request = Native.safelight_request_new(Native.Utf8(prompt));
            }
            if (Model != null) Native.safelight_request_set_model(request, Native.Utf8(Model));
            if (NegativePrompt != null) Native.safelight_request_set_negative_prompt(request, Native.Utf8(NegativePrompt));
            if (WidthPx is int width && HeightPx is int height) Native.safelight_request_set_size(request, width, height);
            if (NumInferenceSteps is int steps) Native.safelight_request_set_num_inference_steps(request, steps);
            if (GuidanceScale is double scale) Native.safelight_request_set_guidance_scale(request, scale);
            if (GuidanceInterval is GuidanceInterval interval)
            {
                Native.safelight_request_set_guidance_interval(request, interval.Start, interval.End);
            }
            if (GuidanceRescale is double rescale) Native.safelight_request_set_guidance_rescale(request, rescale);
            if (QualityFloor is QualityFloor floor)
            {
                Native.safelight_request_set_quality_floor(
                    request, floor.MinNumSteps ?? 0, floor.CheaperPreviews ? 1 : 0, floor.MinSimilarity ?? 0);
            }
            if (InitImage != null) Native.safelight_request_set_init_image(request, Native.Utf8(InitImage));
            if (Strength is double strength) Native.safelight_request_set_strength(request, strength);
            if (Mask != null) Native.safelight_request_set_mask(request, Native.Utf8(Mask));
            foreach (ulong seed in Seeds) Native.safelight_request_add_output(request, seed);
            if (PreviewMaxEdgePx is int edge) Native.safelight_request_set_preview_max_edge(request, edge);
            if (PreviewEveryNSteps is int n) Native.safelight_request_set_preview_every_n_steps(request, n);
            if (PictureMediaType != null) Native.safelight_request_set_picture_media_type(request, Native.Utf8(PictureMediaType));
            return request;
        }
    }
}
